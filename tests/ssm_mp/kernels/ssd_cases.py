"""Inputs for the scan of Mamba-2, random and extreme, and what they give in float64, straight from the recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """step: factor on the random step sizes before softplus, shift: added to them; rate: the greatest −A."""

    b: int
    length: int
    heads: int
    width: int
    states: int
    groups: int = 1
    step: float = 1.0
    shift: float = 0.0
    rate: float = 16.0
    limits: tuple[float, float | None] = (0.0, None)
    state: bool = False


CASES = {
    "odd sizes, two groups": Sizes(2, 70, 6, 7, 5, groups=2),
    "one of everything": Sizes(1, 1, 1, 1, 1),
    "one token, from a state": Sizes(3, 1, 4, 16, 24, state=True),
    "a few tokens, from a state": Sizes(2, 5, 4, 33, 17, state=True),
    "whole chunks": Sizes(1, 192, 2, 16, 8),
    "heads of 64, states of 128": Sizes(1, 150, 2, 64, 128, state=True),
    "as many groups as heads": Sizes(1, 77, 4, 32, 6, groups=4, state=True),
    "huge and vanishing steps": Sizes(2, 130, 3, 8, 4, step=60.0),
    "steps of thousands": Sizes(1, 70, 3, 8, 4, step=3000.0),
    "small steps, small rates, from a state": Sizes(1, 300, 3, 8, 4, step=0.5, shift=-12.0, rate=0.1, state=True),
    "large rates": Sizes(2, 70, 3, 8, 4, rate=1e4),
    "limits on both sides": Sizes(2, 70, 3, 8, 4, limits=(0.3, 0.9)),
    "a lower limit, small steps": Sizes(2, 70, 3, 8, 4, shift=-9.0, limits=(0.001, None)),
    "long": Sizes(1, 1000, 2, 4, 4, shift=-6.0),
}


def inputs_of(sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """x, B and C are strided views, as the convolution gives them, and so is dt."""
    generator = torch.Generator().manual_seed(seed)
    b, length, heads, width, groups = sizes.b, sizes.length, sizes.heads, sizes.width, sizes.groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inner, of_groups = heads * width, groups * sizes.states
    xBC = normal(b, length, inner + 2 * of_groups)
    x, B, C = xBC.split((inner, of_groups, of_groups), dim=-1)
    return {
        "x": x.unflatten(-1, (heads, -1)),
        "dt": (normal(b, length, heads + 3) * sizes.step + sizes.shift)[..., 3:],
        "A": -torch.rand(heads, generator=generator) * sizes.rate - 0.01,
        "B": B.unflatten(-1, (groups, -1)),
        "C": C.unflatten(-1, (groups, -1)),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "limits": sizes.limits,
        "state": normal(b, heads, width, sizes.states) if sizes.state else None,
    }


def truth(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y `[b, l, H, P]` and the last state `[b, H, P, N]`, float64, head by head and token by token."""
    double = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    x, dt, A, B, C, D, dt_bias, (low, high), state = double.values()
    steps = torch.logaddexp(dt + dt_bias, torch.zeros((), dtype=torch.float64)).clamp(low, high)
    b, length, heads, width = x.shape
    y = torch.zeros_like(x)
    last = torch.zeros(b, heads, width, B.shape[3], dtype=torch.float64) if state is None else state.clone()
    for h in range(heads):
        g = h // (heads // B.shape[2])
        for t in range(length):
            step, x_t = steps[:, t, h, None], x[:, t, h]  # [b, 1], [b, P]
            brought = (step * x_t)[:, :, None] * B[:, t, g, None, :]
            last[:, h] = torch.exp(step * A[h])[..., None] * last[:, h] + brought
            y[:, t, h] = (last[:, h] @ C[:, t, g, :, None])[..., 0] + D[h] * x_t
    return y, last
