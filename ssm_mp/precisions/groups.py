"""Group-wise quantisation below 8 bits as pure functions: code books, scales, packing.

Dimensions: `g` groups of `n` values (32, 64 or 128), `c` codes of a book.

A tensor is read row after row as one list of values, cut into groups; the last group is filled up with zeros, which
are stored and counted. Each group has one float16 scale; a value is a level of the book times it. Of a book that is not
symmetric the scale may be negative: the group's values then decide which end of the book reaches which of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.precisions.quantize import FLOAT16_SMALLEST, clippings, least_square_scales, stored_scales
from ssm_mp.scheme import ScaleRule

GROUP = 64
"""Values that share a scale, unless a precision says otherwise."""

CLIPPINGS = 33
"""Clippings of a group's range that the least-square rule tries, for both signs of a scale together: fewer than of a
row, there are more groups."""


@dataclass(frozen=True)
class CodeBook:
    """The values that the codes stand for, code by code, in any order, before the scale.

    either_sign: whether scales of both signs are tried; only where the values are not symmetric does that change
    anything.
    """

    bits: int
    values: tuple[float, ...]
    either_sign: bool = False

    @cached_property
    def limit(self) -> float:
        """The largest magnitude."""
        return max(abs(value) for value in self.values)

    @cached_property
    def reach(self) -> float:
        """The value of the largest magnitude, with its sign; the positive one where both ends are as far."""
        return max(self.values, key=lambda value: (abs(value), value))

    @cached_property
    def widest(self) -> float:
        """How many times the scale of `reach` a scale is with which the nearer end reaches as far; 1 where it is 0."""
        nearer = min(-min(self.values), max(self.values))
        return self.limit / nearer if nearer > 0 else 1.0

    @cached_property
    def rising(self) -> tuple[int, ...]:
        """The codes in the order of their values."""
        return tuple(sorted(range(len(self.values)), key=self.values.__getitem__))

    @cached_property
    def is_of_integers(self) -> bool:
        """Whether the values are all integers from `lowest` to the largest, and codes count up from the first of them,
        modulo 2^bits."""
        counted = ((code + int(self.values[0]) - self.lowest) % (1 << self.bits) for code in range(len(self.values)))
        return self.values == tuple(float(self.lowest + place) for place in counted)

    @property
    def lowest(self) -> int:
        """The smallest value, rounded down."""
        return int(min(self.values) // 1)

    def levels(self, device: torch.device) -> Tensor:
        """The value of each code, float32 `[c]`."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def clippings(self, rule: ScaleRule) -> Sequence[float]:
        """The parts of a range that a rule tries, the whole first; negative: with the other sign of the scale."""
        if rule.method != "mse":
            return (1.0,)
        if not self.either_sign:
            return clippings(CLIPPINGS, self.widest)
        tried = clippings(CLIPPINGS // 2 + 1, self.widest)
        return (*tried, *(-part for part in tried))


def to_groups(tensor: Tensor, group: int = GROUP) -> Tensor:
    """The values of a tensor, row after row, as groups `[g, n]`, zeros at the end."""
    flat = tensor.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % group)).reshape(-1, group)


def group_count(values: int, group: int = GROUP) -> int:
    """Groups that so many values take."""
    return -(-values // group)


def nearest_codes(groups: Tensor, scales: Tensor, book: CodeBook) -> Tensor:
    """The code of the nearest level for each value of `groups [g, n]`: int32 `[g, n]`; ties go to the lower level."""
    codes = torch.tensor(book.rising, dtype=torch.int32, device=groups.device)
    levels = book.levels(groups.device)[codes]
    between = (levels[1:] + levels[:-1]) / 2
    places = torch.bucketize((groups / scales.float()[:, None]).contiguous(), between, out_int32=True)
    return places if book.rising == tuple(range(len(book.rising))) else codes[places]


def group_scales(groups: Tensor, rule: ScaleRule, book: CodeBook, weight: Tensor | None = None) -> Tensor:
    """Scale of each of `groups [g, n]` by a rule: float16 `[g]`, as stored; negative ones only of a book that is not
    symmetric. Raises InfeasibleError where float16 cannot hold one.

    `minmax` and `percentile` let the farther end of the book reach the largest magnitude (a percentile of so few values
    is their largest); `mse` takes the clipping of the range with the least squared error, each value counting by
    `weight` (float32, `[n]` or `[g, n]`; equally where there is none).
    """
    full = group_ranges(groups, book)
    return best_group_scales(groups, full, book, weight) if rule.method == "mse" else stored_scales(full)


def group_ranges(groups: Tensor, book: CodeBook) -> Tensor:
    """The scale with which the farther end of the book is the value of largest magnitude of each group, the negative
    one where both signs have it; where both ends are as far, the positive scale: float32 `[g]`. Of zeros, where the
    book has none, the smallest of float16: they are then as good as zeros."""
    least, most = torch.aminmax(groups, dim=1)
    if min(book.values) == -max(book.values):
        ranges = torch.maximum(-least, most) / book.limit
    else:
        ranges = torch.where(-least >= most, least, most) / book.reach
    # a scale of 1 would turn zeros into the least level
    return ranges if 0.0 in book.values else torch.where(ranges == 0, FLOAT16_SMALLEST, ranges)


def best_group_scales(groups: Tensor, full: Tensor, book: CodeBook, weight: Tensor | None = None) -> Tensor:
    """The stored scales `[g]` of least square error; `full [g]`: those of `group_ranges`; weight: as in
    `group_scales`."""
    return least_square_scales(
        full, lambda scales: _square_error(groups, scales, book, weight), book.clippings(ScaleRule("mse"))
    )


def _square_error(groups: Tensor, scales: Tensor, book: CodeBook, weight: Tensor | None) -> Tensor:
    """Squared quantisation error of each group: float32 `[g]`."""
    codes = nearest_codes(groups, scales, book)
    restored = book.levels(groups.device)[codes] * scales.float()[:, None]
    error = (restored - groups).square_()
    return (error if weight is None else error * weight).sum(dim=1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., k]` below 2^bits → bytes `[..., k·bits/8]`, uint8; the first code in the lowest bits.

    k·bits must be a multiple of 8.
    """
    planes = (codes[..., None].int() >> torch.arange(bits, device=codes.device)) & 1  # [..., k, bits]
    octets = planes.reshape(*codes.shape[:-1], -1, 8)  # [..., bytes, 8]
    return (octets << torch.arange(8, device=codes.device)).sum(dim=-1).to(torch.uint8)


def unpack_reference(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`, bit by bit: int64 `[..., k]`."""
    planes = (packed[..., None].int() >> torch.arange(8, device=packed.device)) & 1  # [..., bytes, 8]
    codes = planes.reshape(*packed.shape[:-1], -1, bits)  # [..., k, bits]
    return (codes << torch.arange(bits, device=packed.device)).sum(dim=-1)


def unpack_at(packed: Tensor, bits: int, positions: Tensor) -> Tensor:
    """Single codes of one packed list: `packed [bytes]`, `positions [...]` in codes → int32 `[...]`."""
    first = positions * bits
    byte = first >> 3
    low = packed[byte].int()
    high = packed[(byte + 1).clamp_(max=packed.numel() - 1)].int()  # a code may reach into the next byte
    return ((low | high << 8) >> (first & 7).int()) & ((1 << bits) - 1)


def unpack_values(packed: Tensor, scales: Tensor, book: CodeBook) -> Tensor:
    """Packed groups `[g, n·bits/8]` and scales `[g]` → float32 `[g, n]`, several codes at a time from a table."""
    table = _table(book, packed.device)  # [2^index bits, codes at a time]
    values = table.index_select(0, _indices(packed, book.bits).flatten()).reshape(len(packed), -1)
    return values.mul_(scales.float()[:, None])


def _index_bits(bits: int) -> int:
    """Bits of a number that holds several whole codes: few enough for a table of all such numbers."""
    return 8 if 8 % bits == 0 else 12 if 12 % bits == 0 else 2 * bits


def _indices(packed: Tensor, bits: int) -> Tensor:
    """The numbers of `_index_bits` that packed codes `[g, n·bits/8]` are, in order."""
    width = _index_bits(bits)
    if width == 8:
        return packed.int()
    if width == 12:  # three bytes hold two of them
        triples = packed.reshape(-1, 3).int()
        first = triples[:, 0] | (triples[:, 1] & 15) << 8
        second = triples[:, 1] >> 4 | triples[:, 2] << 4
        return torch.stack((first, second), dim=1)
    octets = packed.reshape(-1, bits)  # eight codes, four of the numbers
    numbers = torch.empty(len(octets), 4, dtype=torch.int32, device=packed.device)
    for i in range(4):
        byte, shift = divmod(i * width, 8)
        number = octets[:, byte].int()
        for further in range(1, (shift + width - 1) // 8 + 1):
            number |= octets[:, byte + further].int() << 8 * further
        numbers[:, i] = (number >> shift) & ((1 << width) - 1)
    return numbers


@cache
def _table(book: CodeBook, device: torch.device) -> Tensor:
    """The values of all codes that a number of `_index_bits` holds, float32."""
    index_bits = _index_bits(book.bits)
    index = torch.arange(1 << index_bits)
    codes = torch.stack([index >> shift & ((1 << book.bits) - 1) for shift in range(0, index_bits, book.bits)], dim=1)
    values = torch.tensor((*book.values, *[0.0] * ((1 << book.bits) - len(book.values))))  # codes that never occur
    return values[codes].to(device)
