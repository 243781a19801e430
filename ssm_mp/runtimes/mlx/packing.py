"""Matrices as MLX packs them: codes along the row in 32-bit words, and for each group of a row `scale · code + bias`.

Dimensions: `…` leading dimensions, `n` rows, `k` values in a row, `c` groups of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssm_mp.runtimes.codes import SHORTEST, Codes, Integers

GROUPS = (128, 64, SHORTEST)
"""Groups that MLX knows, the largest first."""


def group_of(width: int, integers: Integers) -> int | None:
    """In what groups a row of integers is held: those of ours, or where a row has one scale the largest that fit; None
    where none do."""
    ours = integers.group_of(width)
    return None if ours is None else _largest(ours)


def _largest(ours: int) -> int | None:
    """The largest groups that cut groups of `ours` values."""
    return next((group for group in GROUPS if ours % group == 0), None)


def packed_bytes(values: int, bits: int, group: int) -> int:
    """Codes, and a float32 scale and bias for each group."""
    return values * bits // 8 + values // group * 8


def grouped(codes: Codes) -> Codes:
    """The same in MLX's groups, scales float32."""
    group = _largest(codes.group)
    assert group is not None
    return replace(codes, scale=codes.scale.float().repeat_interleave(codes.group // group, dim=-1))


def multiplied(codes: Codes, factors: Tensor) -> Codes:
    """With scales times a factor for each row, float64 `[…, n]`, rounded so that a code times its scale is exact."""
    scale = codes.scale.double() * factors[..., None]
    mantissa, exponent = torch.frexp(scale)
    steps = 2.0 ** (24 - codes.bits)
    return replace(codes, scale=torch.ldexp((mantissa * steps).round() / steps, exponent).float())


def arrays(codes: Codes) -> dict[str, Tensor]:
    """What a module holds: `weight` uint32 `[…, n, k·bits/32]`, `scales` and `biases` float32 `[…, n, c]`."""
    words = codes.packed.contiguous().view(torch.uint32)
    return {
        "weight": words, "scales": codes.scale.contiguous(), "biases": (-codes.zero * codes.scale).contiguous()
    }  # fmt: skip
