"""What a tensor of the file is made of: rows of the model's tensors, in some order.

Dimensions: `n` rows, `k` values in a row, `X` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Change = Literal["none", "decay", "one_more"]
"""What is done to values of a tensor that is always float32: nothing; −exp, as llama.cpp holds `A`; one added."""


@dataclass(frozen=True)
class Rows:
    """Rows of one of the model's tensors, by its canonical name.

    order: which ones, in this order; None: all as they are. factor: of their values, a multiplier that llama.cpp has
    no key for.
    """

    tensor: str
    order: Sequence[int] | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    shape: as numpy counts, `[n, k]`, or `[X, n, k]` for all experts of a layer. rows: one after another, none where it
    is zeros. component: whose bytes they are then.
    matrix: of whatever type its component's precision asks for; else it is float32 always.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    matrix: bool = False
    change: Change = "none"
    component: str = ""


def entry(name: str, shape: Sequence[int], tensor: str, change: Change = "none", factor: float = 1.0) -> Entry:
    """A tensor that is one of the model's, float32 always."""
    return Entry(name, tuple(shape), (Rows(tensor, factor=factor),), change=change)


def matrix(name: str, shape: Sequence[int], *rows: Rows) -> Entry:
    """A tensor of whatever type its component's precision asks for."""
    return Entry(name, tuple(shape), rows, matrix=True)


def zeros(name: str, size: int, component: str) -> Entry:
    """A bias that llama.cpp asks for and the model has not."""
    return Entry(name, (size,), (), component=component)
