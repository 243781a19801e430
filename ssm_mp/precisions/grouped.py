"""Precisions below 8 bits, one a code book, in packed groups. A further book is a further line at the end.

Dimensions: `n` values in a row, `g` groups of 64 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls, weights
from ssm_mp.precisions.groups import (
    CLIPPINGS,
    GROUP,
    CodeBook,
    best_group_scales,
    group_count,
    group_ranges,
    nearest_codes,
    pack,
    to_groups,
    unpack_at,
    unpack_values,
)
from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.quantize import clippings, scale_refusal, stored_scales
from ssm_mp.precisions.slices import in_slices, largest_magnitude
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
    takes_any_float = True

    def __init__(self, name: str, book: CodeBook) -> None:
        self.name = name
        self.bits = book.bits
        self.book = book

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        groups = group_count(prod(shape))
        packed = ArraySpec((groups, GROUP * self.book.bits // 8), torch.uint8)
        return {"q": packed, "scale": ArraySpec((groups,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        flat = tensor.reshape(-1)
        shape = (group_count(flat.numel()), GROUP * self.book.bits // 8)
        packed = torch.empty(shape, dtype=torch.uint8, device=tensor.device)
        store = _packed_by_kernel if calls.usable(flat[:0].float()) else _packed
        return GroupedTensor(packed, store(flat, rule, self.book, packed), tuple(tensor.shape), self.book)

    def _refusal(self, largest: float, rule: ScaleRule) -> str | None:
        return scale_refusal(largest, self.book.limit)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return GroupedTensor(arrays["q"], arrays["scale"], shape, self.book)


def _groups_of(flat: Tensor, part: slice) -> Tensor:
    """Some groups of a list of values of any float type: float32 `[g, 64]`."""
    return to_groups(flat[GROUP * part.start : GROUP * part.stop].float())


def _packed(flat: Tensor, rule: ScaleRule, book: CodeBook, packed: Tensor) -> Tensor:
    """Fill `packed [g, 8·bits]` with the values `flat [n]` of any float type, slice by slice; their scales `[g]`.

    What `group_scales`, `nearest_codes` and `pack` give for the whole.
    """
    count = len(packed)
    full = torch.empty(count, device=flat.device)

    def find_range(part: slice) -> None:
        full[part] = group_ranges(_groups_of(flat, part), book)

    in_slices(find_range, count, GROUP, flat.device)
    scale = stored_scales(full)

    def fill(part: slice) -> None:
        groups = _groups_of(flat, part)
        if rule.method == "mse":
            scale[part] = best_group_scales(groups, full[part], book)
        packed[part] = pack(nearest_codes(groups, scale[part], book), book.bits)

    in_slices(fill, count, GROUP, flat.device)
    return scale


def _packed_by_kernel(flat: Tensor, rule: ScaleRule, book: CodeBook, packed: Tensor) -> Tensor:
    """The same by a kernel; least-square scales of as little error, which may be others."""
    scale, factors = torch.empty(len(packed), dtype=torch.float16), clippings(rule, CLIPPINGS)
    levels = book.levels(flat.device)

    def fill(part: slice) -> None:
        groups = _groups_of(flat, part).contiguous()
        weights.quantize_groups(groups, factors, levels, book.bits, book.is_of_integers, packed[part], scale[part])

    in_slices(fill, len(packed), GROUP, flat.device)
    if bool(scale.isinf().any()):
        raise InfeasibleError(scale_refusal(largest_magnitude(flat), book.limit))
    return scale


INT6 = Grouped("int6", INT6_BOOK)
INT5 = Grouped("int5", INT5_BOOK)
NF4 = Grouped("nf4", NF4_BOOK)
INT4 = Grouped("int4", INT4_BOOK)
INT3 = Grouped("int3", INT3_BOOK)
