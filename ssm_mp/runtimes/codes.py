"""Matrices of integers as they are stored, taken over code by code: nothing is quantised anew.

Dimensions: `n` rows, `k` values in a row, `c` groups of a row, `…` leading dimensions such as experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ssm_mp.precisions.grouped import INTEGER_BOOKS, Grouped, GroupedTensor
from ssm_mp.precisions.groups import CodeBook, pack, unpack_reference
from ssm_mp.precisions.int8 import Int8, Int8Tensor
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import Stored

SHORTEST = 32
"""The shortest groups that a row may be cut into: several of them may share one scale of ours."""
_ROWS = 4096
"""Rows that are packed at once: what is unpacked takes up to 32 times the memory."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers: the value of a code is `(code − zero) · scale`.

    packed: codes of so many bits along the row, the first in the lowest bits, uint8 `[…, n, k·bits/8]`.
    scale: of each group of a row, float16 or float32 `[…, n, c]`.
    """

    packed: Tensor
    scale: Tensor
    bits: int
    zero: int

    @property
    def width(self) -> int:
        """Values in a row."""
        return self.packed.shape[-1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.width // self.scale.shape[-1]

    def rows(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with other rows: whatever `change` does to all dimensions but the last."""
        return replace(self, packed=change(self.packed), scale=change(self.scale))

    def values(self) -> Tensor:
        """The integers, int8 `[…, n, k]`."""
        if self.bits == 8:
            return (self.packed ^ self.zero).view(torch.int8)  # less 128, without wider numbers
        flat = self.packed.flatten(0, -2)
        codes = torch.cat([unpack_reference(part, self.bits).to(torch.int8) for part in flat.split(_ROWS)])
        values: Tensor = (codes - self.zero).unflatten(0, self.packed.shape[:-1])
        return values

    def tensor(self) -> Tensor:
        """Dequantised, float32 `[…, n, k]`."""
        return self.values().float() * self.scale.float().repeat_interleave(self.group, dim=-1)


@dataclass(frozen=True)
class Integers:
    """What a precision of integers stores: bits of a code, and how many values share a scale; None: those of a row."""

    bits: int
    group: int | None

    def group_of(self, width: int) -> int | None:
        """The same of rows of `width` values, all of whose groups lie in one row; None where they cannot be cut so."""
        return width if self.group is None else row_group(width, self.group)


def integers_of(precision: str) -> Integers | None:
    """What a precision stores, by its name; None where that is no integers of ours."""
    found = PRECISIONS.get(precision)
    if isinstance(found, Int8):
        return Integers(8, None)
    if isinstance(found, Grouped) and found.book in INTEGER_BOOKS:
        return Integers(found.bits, found.group)
    return None


def row_group(width: int, group: int) -> int | None:
    """The largest groups that cut both rows of `width` values and groups counted through the whole matrix; None where
    they are too short."""
    return gcd(width, group) if width % SHORTEST == 0 else None


def codes_of(held: Stored) -> Codes | None:
    """A matrix of integers as it is stored, if it is one and its rows can be cut into groups; on the CPU."""
    if len(held.shape) != 2:
        return None
    rows, width = held.shape
    if isinstance(held, Int8Tensor):
        return Codes(held.q.cpu().view(torch.uint8) ^ 128, held.scale.cpu()[:, None], 8, 128)
    if not isinstance(held, GroupedTensor) or held.book not in INTEGER_BOOKS:
        return None
    bits, group = held.book.bits, row_group(width, held.group)
    if group is None:
        return None
    row = width * bits // 8
    packed = _counted(held.q.cpu().flatten()[: rows * row].reshape(rows, row), held.book)
    # groups are of the flattened matrix: one may reach from a row into the next
    scale = held.scale.cpu().repeat_interleave(held.group // group)[: rows * width // group].reshape(rows, -1)
    return Codes(packed, scale, bits, -held.book.lowest)


def _counted(packed: Tensor, book: CodeBook) -> Tensor:
    """Packed codes of integers `[n, bytes]` as codes that count up from the lowest."""
    first = int(book.values[0]) - book.lowest
    if first == 0:
        return packed
    parts = (unpack_reference(part, book.bits) + first & (1 << book.bits) - 1 for part in packed.split(_ROWS))
    return torch.cat([pack(part, book.bits) for part in parts])


def joined(parts: Sequence[Codes]) -> Codes:
    """Matrices of equal width, bits and groups, one below the other."""
    first = parts[0]
    assert all((one.bits, one.zero, one.group) == (first.bits, first.zero, first.group) for one in parts)
    if len(parts) == 1:
        return first
    return replace(
        first, packed=torch.cat([one.packed for one in parts]), scale=torch.cat([one.scale for one in parts])
    )


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n, k]` → bytes `[n, k·bits/8]`, uint8, a few rows at a time."""
    if bits == 8:
        return codes.to(torch.uint8)
    return torch.cat([pack(part, bits) for part in codes.split(_ROWS)])
