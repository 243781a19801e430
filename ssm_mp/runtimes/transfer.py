"""A converted model into another runtime's file: planned, written, read back, run by that runtime, only then kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.errors import DisagreementError, ExportError, InfeasibleError
from ssm_mp.files.shown import listed
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.runtimes.exportable import Exportable, at_precisions, with_inputs
from ssm_mp.runtimes.format import Encoding, Format
from ssm_mp.runtimes.placing import put
from ssm_mp.runtimes.running import cannot_verify, missing, require_writer
from ssm_mp.runtimes.verify import Verdict, require_equal_weights, twin_difference, verdict

_SHOWN = 6
_MORE_BITS = 3
"""What a wider form has at least: values that were rounded before are then hardly moved by being rounded anew."""


@dataclass(frozen=True)
class Plan:
    """How a format holds a map: component → encoding, and component → (asked, stored) where that is wider."""

    encodings: Mapping[str, Encoding]
    widened: Mapping[str, tuple[str, str]]

    @property
    def bytes(self) -> int:
        """Of all tensors in the file."""
        return sum(encoding.bytes for encoding in self.encodings.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """In what values differ from ours, each with the components that it is true of."""
        said: dict[str, list[str]] = {}
        for name, encoding in self.encodings.items():
            if encoding.note:
                said.setdefault(encoding.note, []).append(name)
        return tuple(f"{listed(names, _SHOWN)}: {note}" for note, names in said.items())


@dataclass(frozen=True, eq=False)
class Transferred:
    """A written file or folder. `item` is the model as the file holds it, weights only.

    verdict: of the runtime; None where it was not asked, `unverified` then says why.
    """

    path: Path
    format: Format
    plan: Plan
    item: Exportable
    file_bytes: int
    verdict: Verdict | None
    unverified: str
    command: str

    def to_json(self) -> dict[str, Any]:
        """What stands beside the file, and in answers."""
        return {
            "format": self.format.word,
            "bytes": self.plan.bytes,
            "file_bytes": self.file_bytes,
            "widened": {name: list(change) for name, change in self.plan.widened.items()},
            "notes": list(self.plan.notes),
            "verified": self.verdict is not None,
            "verdict": self.unverified if self.verdict is None else self.verdict.to_json(),
            "setup": dict(self.format.details()),
            "command": self.command,
        }


def planned(format_: Format, item: Exportable, widen: bool) -> Plan:
    """How the format holds the item's map.

    Raises ExportError where it does not know the model, or cannot hold some component's precision, with all of these.
    """
    asked_of = {component.name: item.precision(component.name) for component in item.components}
    if widen:
        item = _alike(format_, item)
    refused = format_.refusal_of(item)
    if refused is not None:
        raise ExportError(f"{format_.word}: {refused}")
    encodings: dict[str, Encoding] = {}
    widened: dict[str, tuple[str, str]] = {}
    missing: list[tuple[str, str]] = []
    for component in item.components:
        asked = item.precision(component.name)
        found = _held(format_, component, asked, item.config)
        if found is None:
            missing.append((component.name, asked))
            continue
        stored, encodings[component.name] = found
        if stored != asked_of[component.name]:
            widened[component.name] = (asked_of[component.name], stored)
    if missing:
        raise ExportError(
            f"{format_.word} holds {_listed(missing)} in no precision at all; export another map, or another format"
        )
    if widened and not widen:
        named = [(name, asked) for name, (asked, _) in widened.items()]
        raise ExportError(
            f"{format_.word} cannot hold {_listed(named)}; --widen stores them in the next wider form and says what "
            f'that costs, and a search for it, [export] target = "{format_.word}", finds maps that it holds'
        )
    return Plan(encodings, widened)


def _alike(format_: Format, item: Exportable) -> Exportable:
    """The same model with components that are one tensor in the file at the widest precision of theirs."""
    names, changes = list(PRECISIONS), dict[str, str]()
    for parts in format_.joined(item.config):
        widest = min((changes.get(part, item.precision(part)) for part in parts), key=names.index)
        changes |= {part: widest for part in parts if item.precision(part) != widest}
    return _widened(format_, item, changes)


def _widened(format_: Format, item: Exportable, changes: Mapping[str, str]) -> Exportable:
    try:
        return at_precisions(item, changes) if changes else item
    except InfeasibleError as error:
        raise ExportError(f"{format_.word}: a component cannot be widened: {error}") from None


def _listed(named: Sequence[tuple[str, str]]) -> str:
    return listed([f"{name} at {precision}" for name, precision in named], _SHOWN)


def _held(format_: Format, component: Component, asked: str, config: Config) -> tuple[str, Encoding] | None:
    """The precision that is asked for or else the next wider that the format holds, and how."""
    names, least = list(PRECISIONS), get_precision(asked).bits + _MORE_BITS
    wider = [name for name in names[: names.index(asked)] if get_precision(name).bits >= least]
    for name in (asked, *reversed(wider)):
        encoding = format_.encoding(component, name, config)
        if encoding is not None:
            return name, encoding
    return None


def transfer(
    format_: Format,
    item: Exportable,
    out: Path,
    *,
    widen: bool = False,
    windows: np.ndarray | None = None,
    unverified: str = "",
    replace: bool = False,
    further: Callable[[Plan], Mapping[str, Any]] = lambda plan: {},
) -> Transferred:
    """Write the file or folder `out`, whole or not at all; what its reader or its runtime contradicts is not kept.

    windows: token ids `[w, l]`, int64, that the runtime is asked about; None: it is not asked, and `unverified` says
    why. further: what else is to stand beside the file.
    Raises ExportError for what the format does not hold, DisagreementError where reader or runtime disagree.
    """
    require_writer(format_)
    plan = planned(format_, item, widen)
    changes = {name: stored for name, (_, stored) in plan.widened.items()}
    item = _widened(format_, with_inputs(item, "none"), changes)
    made: list[Transferred] = []

    def write(path: Path) -> Mapping[str, Any]:
        format_.write(item, path)
        made.append(_checked(format_, item, plan, path, out, windows, unverified))
        return {**made[0].to_json(), **further(plan)}

    put(out, format_.suffix, write, replace=replace)
    return made[0]


def _checked(
    format_: Format, item: Exportable, plan: Plan, path: Path, out: Path, windows: np.ndarray | None, unverified: str
) -> Transferred:
    """What is found of a file at `path`, that is to stand at `out`."""
    if not missing(format_.reader):
        require_equal_weights(format_, item, path)
        size = format_.tensor_bytes(path)
        if size != plan.bytes:
            raise DisagreementError(f"{out}: {size} bytes of tensors in the file, not {plan.bytes}; it was not kept")
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    found = None
    if windows is not None:
        unverified = cannot_verify(format_)
        found = None if unverified else _confirmed(format_, item, path, windows)
    return Transferred(
        out, format_, plan, item, sum(file.stat().st_size for file in files), found, unverified,
        format_.command(out, item),
    )  # fmt: skip


def _confirmed(format_: Format, item: Exportable, path: Path, windows: np.ndarray) -> Verdict:
    """The runtime's verdict. Raises DisagreementError where it is against the file, with what a float32 twin shows."""
    try:
        found = verdict(format_, item, path, windows)
        if found.agrees:
            return found
        problem = f"{found.sentence}; the gate is a mean KL of {found.gate:.1g}"
    except DisagreementError as error:
        problem = str(error)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            difference = twin_difference(format_, item, Path(folder), windows)
            fault = (
                "names or arrangement" if difference > format_.largest_twin else "the arithmetic of quantised products"
            )
            said = (
                f"a float32 twin of the same writer is {difference:.1g} off in log-probability, so {fault} is at fault"
            )
        except (ExportError, OSError) as error:
            said = f"and of a float32 twin of the same writer: {error}"
    raise DisagreementError(f"{problem}; {said}; it was not kept")
