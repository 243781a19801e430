"""What a format holds of a model: each component at each precision, how, and in how many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.precision_map import PINNED_TO
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.runtimes.format import Encoding, Format


@dataclass(frozen=True)
class Row:
    """How a format holds one kind of component with rows of one length: precision → encoding, None where it cannot."""

    kind: str
    row: int
    components: int
    encodings: tuple[tuple[str, Encoding | None], ...]


def row_length(component: Component) -> int:
    """Values of a row of its first tensor: what block formats must divide."""
    return component.parameters[0].shape[-1]


def table(format_: Format, components: Iterable[Component], config: Config) -> list[Row]:
    """The capability table of a model: a row for the components of one kind and row length that are held alike; bytes
    are of all of them."""
    grouped: dict[tuple[object, ...], list[tuple[Encoding | None, ...]]] = {}
    for component in components:
        held = tuple(format_.encoding(component, name, config) for name in PRECISIONS)
        alike = tuple(None if one is None else (one.word, one.note) for one in held)
        grouped.setdefault((component.kind, row_length(component), alike), []).append(held)
    return [
        Row(
            str(kind),
            int(str(row)),
            len(group),
            tuple(zip(PRECISIONS, map(_sum, zip(*group, strict=True)), strict=True)),
        )
        for (kind, row, _), group in grouped.items()
    ]


def _sum(held: Sequence[Encoding | None]) -> Encoding | None:
    """One encoding with the bytes of several that differ in nothing else."""
    found = [encoding for encoding in held if encoding is not None]
    return replace(found[0], bytes=sum(encoding.bytes for encoding in found)) if found else None


def sized(format_: Format, components: Iterable[Component], config: Config) -> tuple[Component, ...]:
    """The components with their bytes in the format's files, for the precisions that it holds."""
    found = []
    for component in components:
        held = ((name, format_.encoding(component, name, config)) for name in PRECISIONS)
        found.append(replace(component, sizes=tuple((name, one.bytes) for name, one in held if one is not None)))
    return tuple(found)


def holds(format_: Format, component: Component, precision: str, config: Config) -> bool:
    """Whether a precision is worth anything for a component in the format: whether it takes fewer bytes than fp16
    there, or is fp16 itself."""
    found, wide = (format_.encoding(component, name, config) for name in (precision, PINNED_TO))
    return found is not None and (precision == PINNED_TO or wide is None or found.bytes < wide.bytes)


def not_worth(format_: Format, component: Component, asked: Sequence[str], config: Config) -> dict[str, str]:
    """Of the precisions that are asked for, the widest first, those that a search for the format leaves out, and why:
    it does not hold them, or in no fewer bytes than a wider one."""
    left_out: dict[str, str] = {}
    least: tuple[int, str] | None = None
    for name in asked:
        encoding = format_.encoding(component, name, config)
        if encoding is None:
            left_out[name] = f"{format_.word} holds no {component.kind} with rows of {row_length(component)} at {name}"
        elif least is not None and encoding.bytes >= least[0]:
            left_out[name] = f"{format_.word} stores it as {encoding.word}, which is no smaller than {least[1]}"
        else:
            least = (encoding.bytes, name)
    return left_out
