"""Precisions below 8 bits: a code book, packed, in groups of some size. A further book is a further line at the end.

Dimensions: `n` values in a row, `g` groups of `k` values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls, weights
from ssm_mp.precisions.compensate import Moment, compensated
from ssm_mp.precisions.groups import (
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
from ssm_mp.precisions.quantize import scale_refusal, stored_scales
from ssm_mp.precisions.slices import in_slices, largest_magnitude
from ssm_mp.precisions.stored import ArraySpec, Role, Stored
from ssm_mp.scheme import ScaleRule


def _integers(bits: int) -> CodeBook:
    """All integers of so many bits. The lowest, which has no opposite, has the last code, which version 0.4 left
    unused: what it wrote reads as the same values."""
    limit = (1 << bits - 1) - 1
    return CodeBook(bits, (*map(float, range(-limit, limit + 1)), float(-limit - 1)), either_sign=True)


INT6_BOOK, INT5_BOOK, INT4_BOOK, INT3_BOOK = map(_integers, (6, 5, 4, 3))
INTEGER_BOOKS = (INT6_BOOK, INT5_BOOK, INT4_BOOK, INT3_BOOK)
NF4_BOOK = CodeBook(
    4,
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    either_sign=True,
)  # fmt: skip
"""NormalFloat: quantiles of a normal distribution with an exact zero (Dettmers et al. 2023, QLoRA, appendix E).
Positive values have a level more than negative ones; with a negative scale it is the other way round."""
NF3_BOOK = CodeBook(
    3,
    (
        -1.0, -0.6245089156625145, -0.35131243302838817, -0.11389422067084922,
        0.11389422067084922, 0.35131243302838817, 0.6245089156625145, 1.0,
    ),
)  # fmt: skip
NF2_BOOK = CodeBook(2, (-1.0, -0.2997714222137681, 0.2997714222137681, 1.0))
"""The levels of least squared error for a normal distribution (Max 1960, table I; Lloyd 1982), without a zero: with
as few levels as four it is not worth one: QLoRA's quantiles lose more. With eight they lose as much on projections, and
less on the second reference's embedding (`python -m benchmarks.rounding`)."""


class GroupedTensor(Stored):
    """A tensor stored as packed codes `q [g, k·bits/8]`, uint8, with one float16 scale a group of k values."""

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

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.q.shape[1] * 8 // self.book.bits

    def part(self, rows: slice) -> tuple[Stored, int]:
        """As `Stored.part`. Where groups do not begin where the rows do, it begins at the last row before that a group
        begins with, at most `group` − 1 rows earlier."""
        width, group = self.shape[1], self.group
        first = rows.start - rows.start % (group // gcd(group, width))
        groups = slice(first * width // group, group_count(rows.stop * width, group))
        cut = type(self)(self.q[groups], self.scale[groups], (rows.stop - first, width), self.book)
        return cut, rows.start - first

    def tensor(self) -> Tensor:
        return unpack_values(self.q, self.scale, self.book).flatten()[: prod(self.shape)].reshape(self.shape)

    def rows(self, index: Tensor) -> Tensor:
        width = self.shape[1]
        positions = index[..., None] * width + torch.arange(width, device=index.device)  # [..., n]
        codes = unpack_at(self.q.flatten(), self.book.bits, positions)
        levels = self.book.levels(index.device)
        return levels[codes] * self.scale[positions // self.group].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class Grouped(Precision):
    """Codes of a book, packed, a float16 scale for each group of values; inputs of a product stay as they are."""

    quantizes_inputs = False
    takes_any_float = True

    def __init__(self, name: str, book: CodeBook, group: int = GROUP) -> None:
        self.name = name
        self.bits = book.bits
        self.book = book
        self.group = group

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        groups, row = self._packed_shape(prod(shape))
        return {"q": ArraySpec((groups, row), torch.uint8), "scale": ArraySpec((groups,), torch.float16)}

    def _packed_shape(self, values: int) -> tuple[int, int]:
        """Groups, and bytes of each, of the codes of so many values."""
        return group_count(values, self.group), self.group * self.bits // 8

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        flat = tensor.reshape(-1)
        packed = torch.empty(self._packed_shape(flat.numel()), dtype=torch.uint8, device=tensor.device)
        by_kernel = self.group in weights.GROUPS and calls.usable(flat[:0].float())
        store = _packed_by_kernel if by_kernel else _packed
        return GroupedTensor(packed, store(flat, rule, self.book, packed), tuple(tensor.shape), self.book)

    def compensated(self, weight: Tensor, moment: Moment, damping: float) -> Stored:
        """A `weight [n, k]` rounded so that its products change the least, as `compensate.compensated` does it."""
        packed, scale = compensated(weight, moment, self.book, self.group, damping)
        return GroupedTensor(packed, scale, tuple(weight.shape), self.book)

    def _refusal(self, largest: float, rule: ScaleRule) -> str | None:
        return scale_refusal(largest, self.book.limit)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return GroupedTensor(arrays["q"], arrays["scale"], shape, self.book)


def _packed(flat: Tensor, rule: ScaleRule, book: CodeBook, packed: Tensor) -> Tensor:
    """Fill `packed [g, k·bits/8]` with the values `flat [n]` of any float type, slice by slice; their scales `[g]`.

    What `group_scales`, `nearest_codes` and `pack` give for the whole.
    """
    count, group = len(packed), packed.shape[1] * 8 // book.bits
    full = torch.empty(count, device=flat.device)

    def find_range(part: slice) -> None:
        full[part] = group_ranges(_groups_of(flat, part, group), book)

    in_slices(find_range, count, group, flat.device)
    scale = stored_scales(full)

    def fill(part: slice) -> None:
        groups = _groups_of(flat, part, group)
        if rule.method == "mse":
            scale[part] = best_group_scales(groups, full[part], book)
        packed[part] = pack(nearest_codes(groups, scale[part], book), book.bits)

    in_slices(fill, count, group, flat.device)
    return scale


def _packed_by_kernel(flat: Tensor, rule: ScaleRule, book: CodeBook, packed: Tensor) -> Tensor:
    """The same by a kernel; least-square scales of as little error, which may be others."""
    scale, parts = torch.empty(len(packed), dtype=torch.float16), torch.tensor(book.clippings(rule))
    levels, group = book.levels(flat.device), packed.shape[1] * 8 // book.bits

    def fill(part: slice) -> None:
        groups = _groups_of(flat, part, group).contiguous()
        weights.quantize_groups(groups, parts, levels, book.bits, book.is_of_integers, packed[part], scale[part])

    in_slices(fill, len(packed), group, flat.device)
    if bool(scale.isinf().any()):
        raise InfeasibleError(scale_refusal(largest_magnitude(flat), book.limit))
    return scale


def _groups_of(flat: Tensor, part: slice, group: int) -> Tensor:
    """Some groups of a list of values of any float type: float32 `[g, k]`."""
    return to_groups(flat[group * part.start : group * part.stop].float(), group)


def _of_sizes(name: str, book: CodeBook) -> tuple[Grouped, Grouped, Grouped]:
    """A book in groups of 32, 64 and 128 values; a name says the size where it is not 64."""
    return Grouped(f"{name}g32", book, 32), Grouped(name, book), Grouped(f"{name}g128", book, 128)


INT6 = Grouped("int6", INT6_BOOK)
INT5 = Grouped("int5", INT5_BOOK)
NF4G32, NF4, NF4G128 = _of_sizes("nf4", NF4_BOOK)
INT4G32, INT4, INT4G128 = _of_sizes("int4", INT4_BOOK)
NF3G32, NF3, NF3G128 = _of_sizes("nf3", NF3_BOOK)
INT3G32, INT3, INT3G128 = _of_sizes("int3", INT3_BOOK)
NF2G32, NF2, NF2G128 = _of_sizes("nf2", NF2_BOOK)
