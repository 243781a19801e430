"""Matrices of integers as they are stored, taken over code by code: nothing is quantised anew.

Dimensions: `n` rows, `k` values in a row, `c` groups of a row, `…` leading dimensions such as experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssm_mp.precisions.grouped import INTEGER_BOOKS, GroupedTensor
from ssm_mp.precisions.groups import GROUP, pack, unpack_reference
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.stored import Stored

HALF = GROUP // 2
"""The shorter groups that a row may be cut into: two of them share one scale of ours."""
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


def codes_of(held: Stored) -> Codes | None:
    """A matrix of integers as it is stored, if it is one and its rows can be cut into groups; on the CPU."""
    if len(held.shape) != 2:
        return None
    rows, width = held.shape
    if isinstance(held, Int8Tensor):
        return Codes(held.q.cpu().view(torch.uint8) ^ 128, held.scale.cpu()[:, None], 8, 128)
    if not isinstance(held, GroupedTensor) or held.book not in INTEGER_BOOKS or width % HALF:
        return None
    bits, group = held.book.bits, GROUP if width % GROUP == 0 else HALF
    row = width * bits // 8
    packed = held.q.cpu().flatten()[: rows * row].reshape(rows, row)
    # groups are of the flattened matrix: one may reach from a row into the next
    scale = held.scale.cpu().repeat_interleave(GROUP // group)[: rows * width // group].reshape(rows, -1)
    return Codes(packed, scale, bits, (1 << bits - 1) - 1)


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
