"""Group-wise quantisation below 8 bits as pure functions: code books, scales, packing.

Dimensions: `g` groups of 64 values, `c` codes of a book, `n` values of a tensor.

A tensor is read row after row as one list of values, cut into groups of 64; the last group is filled up with
zeros, which are stored and counted. Each group has one float16 scale; a value is a code of the book times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.precisions.quantize import least_square_scales, stored_scales
from ssm_mp.scheme import ScaleRule

GROUP = 64
"""Values that share a scale."""

CLIPPINGS = 33
"""Clippings of a group's range that the least-square rule tries: fewer than of a row, there are more groups."""


@dataclass(frozen=True)
class CodeBook:
    """The values that a code can stand for, rising, before the scale; the largest magnitude is `limit`."""

    bits: int
    values: tuple[float, ...]

    @property
    def limit(self) -> float:
        return max(abs(value) for value in self.values)

    @property
    def is_of_integers(self) -> bool:
        """Whether its values are all integers between two opposite ones."""
        return self.values == tuple(map(float, range(-int(self.limit), int(self.limit) + 1)))

    def levels(self, device: torch.device) -> Tensor:
        """The values as float32 `[c]`."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)


def to_groups(tensor: Tensor) -> Tensor:
    """The values of a tensor, row after row, as groups `[g, 64]`, zeros at the end."""
    flat = tensor.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % GROUP)).reshape(-1, GROUP)


def group_count(values: int) -> int:
    """Groups that so many values take."""
    return -(-values // GROUP)


def nearest_codes(groups: Tensor, scales: Tensor, book: CodeBook) -> Tensor:
    """The code of the nearest level for each value of `groups [g, 64]`: int32 `[g, 64]`; ties go down."""
    levels = book.levels(groups.device)
    between = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize((groups / scales.float()[:, None]).contiguous(), between, out_int32=True)


def group_scales(groups: Tensor, rule: ScaleRule, book: CodeBook) -> Tensor:
    """Scale of each group by a rule: float16 `[g]`, as stored. Raises InfeasibleError where float16 cannot hold one.

    `minmax` and `percentile` reach to the largest magnitude (a percentile of 64 values is their largest);
    `mse` takes the clipping of the range with the least squared error.
    """
    full = group_ranges(groups, book)
    return best_group_scales(groups, full, book) if rule.method == "mse" else stored_scales(full)


def group_ranges(groups: Tensor, book: CodeBook) -> Tensor:
    """The scale with which the book reaches the largest magnitude of each group: float32 `[g]`."""
    return groups.abs().amax(dim=1) / book.limit


def best_group_scales(groups: Tensor, full: Tensor, book: CodeBook) -> Tensor:
    """The stored scales `[g]` of least square error; `full [g]`: those that clip nothing."""
    return least_square_scales(full, lambda scales: _square_error(groups, scales, book), CLIPPINGS)


def _square_error(groups: Tensor, scales: Tensor, book: CodeBook) -> Tensor:
    """Squared quantisation error of each group: float32 `[g]`."""
    codes = nearest_codes(groups, scales, book)
    restored = book.levels(groups.device)[codes] * scales.float()[:, None]
    return (restored - groups).square_().sum(dim=1)


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
    """Packed groups `[g, 8·bits]` and scales `[g]` → float32 `[g, 64]`, several codes at a time from a table."""
    table = _table(book, packed.device)  # [2^index bits, codes at a time]
    values = table.index_select(0, _indices(packed, book.bits).flatten()).reshape(-1, GROUP)
    return values.mul_(scales.float()[:, None])


def _index_bits(bits: int) -> int:
    """Bits of a number that holds several whole codes: few enough for a table of all such numbers."""
    return 8 if 8 % bits == 0 else 12 if 12 % bits == 0 else 2 * bits


def _indices(packed: Tensor, bits: int) -> Tensor:
    """The numbers of `_index_bits` that packed codes `[g, 8·bits]` are, in order."""
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
