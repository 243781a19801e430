"""Inputs for scans, random and extreme, and what they give in float64, straight from the recurrences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-5
"""Largest error over the largest value."""


@dataclass(frozen=True)
class Sizes:
    """step: factor on the random step sizes before softplus, shift: added to them."""

    b: int
    length: int
    inner: int
    states: int
    step: float = 1.0
    shift: float = 0.0
    state: bool = False


QUICK = {
    "more channels than a block, states no power of two": Sizes(2, 9, 37, 5),
    "one channel, one state, one step": Sizes(1, 1, 1, 1),
    "from a state": Sizes(2, 8, 20, 16, state=True),
    "huge and vanishing steps": Sizes(2, 24, 8, 4, step=60.0),
    "steps of thousands": Sizes(1, 8, 8, 4, step=3000.0),
    "small steps, from a state": Sizes(1, 24, 8, 4, step=0.5, shift=-12.0, state=True),
}
LONG = {
    "long": Sizes(1, 1000, 4, 4),
    "long, small steps": Sizes(1, 1000, 4, 4, shift=-6.0),
    "long, large steps": Sizes(1, 1000, 4, 4, step=60.0),
}
CASES = QUICK | LONG


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) at any x; torch's own is only near that above its threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def selective_inputs(name: str) -> dict[str, Tensor | None]:
    """Inputs of Mamba's scan; B, C and z are strided views, as the projections give them."""
    sizes, generator = CASES[name], torch.Generator().manual_seed(0)
    b, length, inner, states = sizes.b, sizes.length, sizes.inner, sizes.states

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    projected = normal(b, length, 3 + 2 * states)
    return {
        "a": normal(b, length, inner),
        "dt": normal(b, length, inner) * sizes.step + sizes.shift,
        "A": -torch.rand(inner, states, generator=generator) * 8 - 0.01,
        "B": projected[..., 3 : 3 + states],
        "C": projected[..., 3 + states :],
        "D": normal(inner),
        "z": normal(b, length, 2 * inner)[..., inner:] * sizes.step,
        "state": normal(b, inner, states) if sizes.state else None,
    }


def recurrence_inputs(name: str) -> dict[str, Tensor | None]:
    """Inputs of the recurrence of the `itera` scan."""
    sizes, generator = CASES[name], torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    step = _softplus(normal(sizes.b, sizes.length, 1) * sizes.step + sizes.shift)
    rate = -torch.rand(sizes.states, generator=generator) * 8 - 0.01
    return {
        "decay": torch.exp(step * rate),
        "driven": step * normal(sizes.b, sizes.length, sizes.states),
        "state": normal(sizes.b, sizes.states) * sizes.state,
    }


def _double(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double() for name, value in inputs.items()}


def selective_truth(inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """y `[b, l, I]` and the last state `[b, I, N]`, float64."""
    a, dt, A, B, C, D, z, state = _double(inputs).values()
    assert a is not None and dt is not None and A is not None and B is not None  # noqa: PT018, types only
    assert C is not None and D is not None and z is not None  # noqa: PT018, types only
    h = torch.zeros(a.shape[0], *A.shape, dtype=torch.float64) if state is None else state
    outputs = []
    for t in range(a.shape[1]):
        step = _softplus(dt[:, t])  # [b, I]
        h = torch.exp(step[..., None] * A) * h + (step * a[:, t])[..., None] * B[:, t, None, :]
        outputs.append(((h * C[:, t, None, :]).sum(-1) + D * a[:, t]) * F.silu(z[:, t]))
    return torch.stack(outputs, dim=1), h


def recurrence_truth(inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """All states `[b, l, N]` and the last one `[b, N]`, float64."""
    decay, driven, h = _double(inputs).values()
    assert decay is not None and driven is not None and h is not None  # noqa: PT018, types only
    outputs = []
    for t in range(driven.shape[1]):
        h = decay[:, t] * h + driven[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


Inputs = Callable[[str], dict[str, Tensor | None]]
Truth = Callable[[Mapping[str, Tensor | None]], tuple[Tensor, Tensor]]

FAMILIES: dict[str, tuple[Inputs, Truth]] = {
    "selective_scan": (selective_inputs, selective_truth),
    "shared_step_recurrence": (recurrence_inputs, recurrence_truth),
}


def require_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Outputs and last state within `TOLERANCE` of the float64 ones."""
    for ours, truth in zip(found, expected, strict=True):
        assert ours.shape == truth.shape
        assert (ours.double().cpu() - truth).abs().max() <= TOLERANCE * truth.abs().max()
