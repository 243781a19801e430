"""What `[precision] prepare = "scales"` chose, kept in the run directory, so that every worker folds the same.

The file is an archive of arrays under a mark of all that they depend on; where it is damaged, or of something else,
scales are chosen again.

Dimensions: `f` foldings, `c` components with exponents of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search.base.progress import slow
from search.problem.run_directory import GROUPING, mark_of
from search.problem.spec import StudySpec
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.conversion.prepare import (
    FEWEST_ALONE,
    Prepared,
    foldings_of,
    prepare,
    require_in_memory,
    unfoldable_of,
)
from ssm_mp.conversion.regroup import grouping_of
from ssm_mp.data import Windows
from ssm_mp.files.shown import listed
from ssm_mp.model import LanguageModel

PREPARED = "prepared.npz"

_VERSION = 2
"""Of how scales are chosen and kept."""

Say = Callable[[str], None]


def preparation_of(
    spec: StudySpec,
    checkpoint: Checkpoint,
    model: LanguageModel,
    windows: Windows,
    compute: str,
    say: Say,
    folder: Path | None,
) -> Prepared | None:
    """The scales of a study, from an earlier process where it kept them in a folder; None where it asks for none.

    compute: what results depend on of the machine. Raises PrecisionMapError where the model is too large.
    """
    if spec.precision.prepare == "none":
        return None
    require_in_memory(model)
    depends = {
        "checkpoint": checkpoint.digest,
        "windows": windows.digest,
        "choices": list(spec.precision.choices),
        "scheme": spec.precision.scheme.to_json(),
        GROUPING: grouping_of(checkpoint.config),
        "compute": compute,
    }
    mark = mark_of({"version": _VERSION, **depends})
    found = _kept(folder, mark, say)
    if found is None:
        found = _chosen(spec, model, windows, say)
        _keep(folder, mark, found, say)
    say(
        f"prepared: scales folded at {found.changed} of {len(found.foldings)} places, inputs of {len(found.inputs)} "
        "components scaled as they are rounded"
    )
    return found


def digest_of(prepared: Prepared) -> str:
    """The scales as one short word."""
    found = hashlib.sha256()
    for exponent in prepared.foldings:
        found.update(exponent.numpy().tobytes())
    for name, exponent in sorted(prepared.inputs.items()):
        found.update(name.encode() + exponent.numpy().tobytes())
    return found.hexdigest()[:16]


def _chosen(spec: StudySpec, model: LanguageModel, windows: Windows, say: Say) -> Prepared:
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


def _kept(folder: Path | None, mark: str, say: Say) -> Prepared | None:
    """What a folder holds; None where there is nothing, or of something else. An archive checks its own sums."""
    if folder is None or not (folder / PREPARED).exists():
        return None
    path = folder / PREPARED
    try:
        with np.load(path, allow_pickle=False) as held:
            return _prepared(held) if str(held["mark"]) == mark else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"note: {path} is damaged ({error}); choosing scales again")
        return None


def _prepared(held: Mapping[str, Any]) -> Prepared:
    exponents, ends, names = held["exponents"], held["sizes"].cumsum(), held["names"].tolist()
    parts = [torch.from_numpy(part) for part in np.split(exponents, ends)[:-1]]
    if len(ends) < len(names) or (len(ends) and int(ends[-1]) != len(exponents)):
        raise ValueError(f"{len(exponents)} exponents of {len(ends)} places")
    places = len(ends) - len(names)
    return Prepared(tuple(parts[:places]), dict(zip(map(str, names), parts[places:], strict=True)))


def _keep(folder: Path | None, mark: str, prepared: Prepared, say: Say) -> None:
    """Write the file whole: under another name first, then renamed."""
    if folder is None:
        return
    path = folder / PREPARED
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    every = [exponent.numpy() for exponent in (*prepared.foldings, *prepared.inputs.values())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                mark=np.array(mark),
                names=np.array(list(prepared.inputs), dtype=str),
                sizes=np.array([len(exponent) for exponent in every], dtype=np.int64),
                exponents=np.concatenate(every) if every else np.zeros(0, np.int8),
            )
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        say(f"note: the scales cannot be kept, other processes choose them again ({error})")
