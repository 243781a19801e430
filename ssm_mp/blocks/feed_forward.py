"""Feed-forwards.

Dimensions: `d` model, `E` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.modules.parameter import Parameter


@dataclass(frozen=True, kw_only=True)
class FeedForward(Block):
    """`down_proj(GELU(up_proj(u)))`."""

    word = "feed_forward"

    d_hidden: int

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        yield from self.linear(at, layer, "up_proj", self.d_hidden, self.d_model)
        yield from self.linear(at, layer, "down_proj", self.d_model, self.d_hidden)

    def module(self, parts: Parts, scan: Scan | None = None) -> FeedForwardMixing:
        return FeedForwardMixing(parts)

    @property
    def token_floats(self) -> int:
        return 8 * self.d_model + 6 * self.d_hidden


class FeedForwardMixing(Mixing):
    """The module of `FeedForward`; it carries nothing."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.up_proj = parts["up_proj"]
        self.down_proj = parts["down_proj"]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        return self.down_proj(F.gelu(self.up_proj(u))), ()
