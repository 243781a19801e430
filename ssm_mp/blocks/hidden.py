"""What a feed-forward does between its projections, be it a block of its own or one expert of many.

Dimensions: `E` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import feed_forward as kernels

Activation = Literal["gelu", "gelu_tanh", "relu2", "silu"]
"""`gelu` is the exact one, with erf; `relu2` is relu(x)²."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Hidden:
    """The hidden values of a feed-forward: `activation(up)`, or `activation(gate · multiplier) · up` where gated.

    fused: gated, and gate and up are, in this order, the rows of one projection.
    """

    size: int
    activation: Activation
    gated: bool = False
    fused: bool = False
    gate_multiplier: float = 1.0

    @property
    def inward(self) -> tuple[tuple[str, int], ...]:
        """The projections of the inputs by name, each with its number of outputs."""
        if self.fused:
            return (("input_linear", 2 * self.size),)
        return (("gate_proj", self.size), ("up_proj", self.size)) if self.gated else (("up_proj", self.size),)

    @property
    def linear(self) -> tuple[str, int] | None:
        """The projection, and its first row, that hidden values are proportional to one to one; None: none is."""
        if self.fused:
            return "input_linear", self.size
        return ("up_proj", 0) if self.gated else None

    @property
    def outward(self) -> str:
        """The name of the projection of what is hidden."""
        return "output_linear" if self.fused else "down_proj"

    def of(self, *products: Tensor) -> Tensor:
        """What the inward projections gave, `[..., outputs]` each → `[..., E]`."""
        activation = ACTIVATIONS[self.activation]
        if not self.fused and not self.gated:
            return activation(products[0])
        gate, up = products[0].chunk(2, dim=-1) if self.fused else products
        return activation(gate if self.gate_multiplier == 1.0 else gate * self.gate_multiplier) * up

    @property
    def structure(self) -> kernels.Hidden:
        """As the kernels take it."""
        gated, activation = self.gated or self.fused, kernels.ACTIVATIONS.index(self.activation)
        return kernels.Hidden(self.size, activation, gated, self.gate_multiplier if gated else 1.0)
