"""What `[precision] prepare = "scales"` chose, kept in the run directory, so that every worker folds the same.

Dimensions: `f` foldings, `c` components with exponents of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch

from search.base.progress import slow
from search.problem.calibrating import Calibrating
from search.problem.kept_arrays import Array, KeptArrays
from search.problem.run_directory import RunDirectory
from ssm_mp.conversion.prepare import (
    FEWEST_ALONE,
    Prepared,
    foldings_of,
    prepare,
    require_in_memory,
    unfoldable_of,
)
from ssm_mp.files.shown import listed


def preparation_of(given: Calibrating) -> Prepared | None:
    """The scales of a study, from an earlier process where it kept them in a folder; None where it asks for none.

    Raises PrecisionMapError where the model is too large.
    """
    precision, folder = given.spec.precision, given.folder
    if precision.prepare == "none":
        return None
    require_in_memory(given.model)
    depends = {**given.depends, "choices": list(precision.choices), "scheme": precision.scheme.to_json()}
    # processes that choose by themselves may differ in a scale
    with nullcontext() if folder is None else RunDirectory(folder).lock(PREPARED.name).held():
        found = PREPARED.of(folder, depends, lambda: _chosen(given), given.say)
    given.say(
        f"prepared: scales folded at {found.changed} of {len(found.foldings)} places, inputs of {len(found.inputs)} "
        "components scaled as they are rounded"
    )
    return found


def _chosen(given: Calibrating) -> Prepared:
    spec, model, windows, say = given.spec, given.model, given.windows, given.say
    say(f"choosing scales on {len(windows)} windows ({spec.data.calibration})")
    precision, config = spec.precision, model.config
    alone = unfoldable_of(config) if precision.activations == "static" else ()
    if alone and windows.ids.numel() < FEWEST_ALONE:
        say(
            f"note: inputs of {listed(alone, 2)} are not scaled: {windows.ids.numel():,} calibration tokens say too "
            f"little of their channels, expected at least {FEWEST_ALONE:,}; take [data] calibration_windows = "
            f"{-(-FEWEST_ALONE // windows.length)}"
        )
    step = slow("choosing scales", len(foldings_of(config)) + len(alone)).step
    return prepare(model, windows, precision.choices, precision.scheme, step)


def _arrays(prepared: Prepared) -> dict[str, Array]:
    every = [exponent.numpy() for exponent in (*prepared.foldings, *prepared.inputs.values())]
    return {
        "names": np.array(list(prepared.inputs), dtype=str),  # [c]
        "sizes": np.array([len(exponent) for exponent in every], dtype=np.int64),  # [f + c]
        "exponents": np.concatenate(every) if every else np.zeros(0, np.int8),
    }


def _restored(held: Mapping[str, Array]) -> Prepared:
    exponents, ends, names = held["exponents"], held["sizes"].cumsum(), held["names"].tolist()
    parts = [torch.from_numpy(part) for part in np.split(exponents, ends)[:-1]]
    if len(ends) < len(names) or (len(ends) and int(ends[-1]) != len(exponents)):
        raise ValueError(f"{len(exponents)} exponents of {len(ends)} places")
    places = len(ends) - len(names)
    return Prepared(tuple(parts[:places]), dict(zip(map(str, names), parts[places:], strict=True)))


PREPARED = KeptArrays("prepared.npz", 1, "what was prepared", "choosing scales", _arrays, _restored)
