"""Weights whose rounding is compensated: made once a study, kept in the run directory for all of its processes.

One file a component, which holds it at every precision that the study asks for, under a mark of all that it depends on.
Where one is damaged, or of something else, rounding is done again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from search.base.errors import StudyError
from search.base.progress import slow
from search.problem.calibrating import Calibrating
from search.problem.memory import MemoryPlan
from search.problem.run_directory import ROUNDING, RunDirectory, mark_of
from search.problem.spec import StudySpec
from ssm_mp.artifact_folder import sha256
from ssm_mp.components import Component
from ssm_mp.conversion.rounding import Key, Rounded, Say, compensable, moment_bytes, rounded
from ssm_mp.errors import MachineError
from ssm_mp.files.safetensors_file import write_safetensors
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import Stored

ROUNDED = "rounded"
"""Folder of the files."""
_VERSION = 1
"""Of the books of levels and of how rounding makes up for errors. Before the first, `int3` had seven levels."""
_SHARE = 3
"""Moments of a layer may take one part in so many of what a study may take."""


def below_8_bits(spec: StudySpec) -> list[str]:
    """The study's precisions that have a book of levels, so that their rounding can be compensated."""
    return [name for name in spec.precision.choices if compensable(name)]


def recorded_rounding(spec: StudySpec, compensates: bool) -> dict[str, Any]:
    """What a fingerprint says of rounding; nothing where every choice is fp16 or int8."""
    if not below_8_bits(spec):
        return {}
    return {ROUNDING: {"rule": "compensated" if compensates else "nearest", "version": _VERSION}}


def compensates(spec: StudySpec, components: Sequence[Component], plan: MemoryPlan, say: Say) -> bool:
    """Whether rounding is compensated: where the study says so, or leaves it open and calibration is from text.

    Raises StudyError where it says so and that cannot be done.
    """
    asked, precisions = spec.precision.rounding, below_8_bits(spec)
    if asked == "nearest" or not precisions or spec.data.calibration != "text":
        return False
    needed, most = moment_bytes(components), plan.bound // _SHARE
    if needed <= most:
        return True
    sentence = (
        f"second moments of a layer's inputs take {needed / 1e9:.1f} GB, and may take {most / 1e9:.1f} GB of the "
        "memory that this study may"
    )
    if asked == "compensated":
        raise StudyError(
            f'{spec.path}: [precision] rounding = "compensated": {sentence}; raise [search] memory_gib to '
            f'{needed * _SHARE / (1 << 30):.0f}, or set rounding = "nearest"'
        )
    say(f"note: weights below 8 bits are rounded to the nearest: {sentence}; [search] memory_gib raises it")
    return False


def rounded_weights(given: Calibrating, components: Sequence[Component]) -> dict[Key, Stored]:
    """The weights of `components` at the study's precisions below 8 bits, from a folder where they are kept in one."""
    precisions, folder, say = below_8_bits(given.spec), given.folder, given.say

    def made() -> Iterator[Rounded]:
        say(f"compensating rounding by {len(given.windows)} calibration windows")
        return rounded(
            given.model, given.windows, components, precisions, say, lambda stage, total: slow(stage, total).step
        )

    if folder is None:
        return {(one.component, precision): stored for one in made() for precision, stored in one.held.items()}
    mark = mark_of(
        {
            "version": _VERSION,
            **given.depends,
            "components": [component.name for component in components],
            "precisions": precisions,
        }
    )
    by_name = {component.name: component for component in components}
    with RunDirectory(folder).lock(ROUNDED).held():  # processes that round by themselves may differ in a code
        kept = _read(folder / ROUNDED, mark, by_name, say)
        if kept is None:
            try:
                _finish(folder / ROUNDED, mark, dict(_write(folder / ROUNDED, one) for one in made()))
            except OSError as error:
                raise MachineError(
                    f"{folder / ROUNDED}: rounded weights cannot be kept there ({error.strerror or error}); free some "
                    "space, or give --run-dir another directory"
                ) from None
            kept = _read(folder / ROUNDED, mark, by_name, say)
    assert kept is not None
    return kept


_LIST = "components.json"
"""Written last: under a mark, the checksum of each component's file."""
_SUFFIX = ".safetensors"


def _finish(folder: Path, mark: str, checksums: Mapping[str, str]) -> None:
    """Write the list, and remove what was left of other components, or by processes that were ended."""
    partial = folder / f".{_LIST}.{os.getpid()}.partial"
    partial.write_text(json.dumps({"mark": mark, "checksums": checksums}), encoding="utf-8")
    partial.replace(folder / _LIST)
    for path in (*folder.glob(f"*{_SUFFIX}"), *folder.glob(".*.partial")):
        if path.name.removesuffix(_SUFFIX) not in checksums:
            path.unlink()


def _write(folder: Path, one: Rounded) -> tuple[str, str]:
    """Write a component's file whole: under another name first, then renamed. Its name and the file's checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{precision}.{suffix}": array
        for precision, held in one.held.items()
        for suffix, array in held.arrays().items()
    }
    partial = folder / f".{one.component}.{os.getpid()}.partial"
    try:
        write_safetensors(partial, arrays, {})
        checksum = sha256(partial)
        partial.replace(folder / f"{one.component}{_SUFFIX}")
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return one.component, checksum


def _read(folder: Path, mark: str, components: Mapping[str, Component], say: Say) -> dict[Key, Stored] | None:
    """What is kept under a mark, mapped from its files; None where nothing is, or not all of it."""
    try:
        listed = json.loads((folder / _LIST).read_text(encoding="utf-8"))
        if listed["mark"] != mark:
            return None
        found: dict[Key, Stored] = {}
        for name, checksum in listed["checksums"].items():
            component, path = components[name], folder / f"{name}{_SUFFIX}"
            if sha256(path) != checksum:
                raise ValueError(f"{path.name} is not what was written")
            found |= _of_file(path, component)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"note: {folder} is damaged ({error}); rounding again")
        return None
    return found


def _of_file(path: Path, component: Component) -> dict[Key, Stored]:
    """The weight of a component at every precision that its file holds."""
    shape = next(p.shape for p in component.parameters if p.leaf == "weight")
    held: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, not a dict
            precision, suffix = name.split(".")
            held.setdefault(precision, {})[suffix] = file.get_tensor(name)
    return {
        (component.name, precision): get_precision(precision).restore(arrays, shape, "weight")
        for precision, arrays in held.items()
    }
