"""Precisions below 8 bits, one a code book, in packed groups. A further book is a further line at the end.

Dimensions: `n` values in a row, `g` groups of 64 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod

import torch
from torch import Tensor

from ssm_mp.precisions.groups import (
    GROUP,
    CodeBook,
    group_count,
    group_scales,
    nearest_codes,
    pack,
    to_groups,
    unpack_at,
    unpack_values,
)
from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.stored import ArraySpec, Role, Stored
from ssm_mp.scheme import ScaleRule


def _integers(bits: int) -> CodeBook:
    """The integers of so many bits but the lowest, which has no opposite."""
    limit = (1 << bits - 1) - 1
    return CodeBook(bits, tuple(map(float, range(-limit, limit + 1))))


INT6_BOOK, INT5_BOOK, INT4_BOOK, INT3_BOOK = map(_integers, (6, 5, 4, 3))
INTEGER_BOOKS = (INT6_BOOK, INT5_BOOK, INT4_BOOK, INT3_BOOK)
NF4_BOOK = CodeBook(
    4,
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""NormalFloat: quantiles of a normal distribution with an exact zero (Dettmers et al. 2023, QLoRA, appendix E)."""


class GroupedTensor(Stored):
    """A tensor stored as packed codes `q [g, 8·bits]`, uint8, with one float16 scale a group of 64 values."""

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, shape: tuple[int, ...], book: CodeBook) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self._shape = shape
        self.book = book

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def part(self, rows: slice) -> tuple[Stored, int]:
        """As `Stored.part`. Where groups do not begin where the rows do, it begins at the last row before that a group
        begins with, at most 63 rows earlier."""
        width = self.shape[1]
        first = rows.start - rows.start % (GROUP // gcd(GROUP, width))
        groups = slice(first * width // GROUP, group_count(rows.stop * width))
        cut = type(self)(self.q[groups], self.scale[groups], (rows.stop - first, width), self.book)
        return cut, rows.start - first

    def tensor(self) -> Tensor:
        return unpack_values(self.q, self.scale, self.book).flatten()[: prod(self.shape)].reshape(self.shape)

    def rows(self, index: Tensor) -> Tensor:
        width = self.shape[1]
        positions = index[..., None] * width + torch.arange(width, device=index.device)  # [..., n]
        codes = unpack_at(self.q.flatten(), self.book.bits, positions)
        levels = self.book.levels(index.device)
        return levels[codes] * self.scale[positions // (self.q.shape[1] * 8 // self.book.bits)].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class Grouped(Precision):
    """Codes of a book, packed, a float16 scale for each 64 values; inputs of a product stay as they are."""

    quantizes_inputs = False

    def __init__(self, name: str, book: CodeBook) -> None:
        self.name = name
        self.bits = book.bits
        self.book = book

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        groups = group_count(prod(shape))
        packed = ArraySpec((groups, GROUP * self.book.bits // 8), torch.uint8)
        return {"q": packed, "scale": ArraySpec((groups,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        groups = to_groups(tensor)
        scale = group_scales(groups, rule, self.book)
        packed = pack(nearest_codes(groups, scale, self.book), self.book.bits)
        return GroupedTensor(packed, scale, tuple(tensor.shape), self.book)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return GroupedTensor(arrays["q"], arrays["scale"], shape, self.book)


INT6 = Grouped("int6", INT6_BOOK)
INT5 = Grouped("int5", INT5_BOOK)
NF4 = Grouped("nf4", NF4_BOOK)
INT4 = Grouped("int4", INT4_BOOK)
INT3 = Grouped("int3", INT3_BOOK)
