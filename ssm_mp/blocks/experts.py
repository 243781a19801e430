"""Experts: a router sends each token to a few feed-forwards.

Dimensions: `d` model, `E` hidden, `X` experts, `m` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.modules.parameter import Parameter


@dataclass(frozen=True, kw_only=True)
class Experts(Block):
    """Each token goes to its `top_k` best experts, weighted by a softmax over those."""

    word = "experts"
    gathers_tokens = True

    d_hidden: int
    experts: int
    top_k: int

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        yield from self.linear(at, layer, "router", self.experts, self.d_model, kind="router")
        for e in range(self.experts):
            yield from self.linear(at, layer, f"experts.{e}.up_proj", self.d_hidden, self.d_model)
            yield from self.linear(at, layer, f"experts.{e}.down_proj", self.d_model, self.d_hidden)

    def module(self, parts: Parts, scan: Scan | None = None) -> ExpertsMixing:
        return ExpertsMixing(self, parts)

    @property
    def token_floats(self) -> int:
        return 8 * self.d_model + 6 * self.d_hidden + 4 * self.experts


class ExpertsMixing(Mixing):
    """The module of `Experts`; it carries nothing."""

    def __init__(self, block: Experts, parts: Parts) -> None:
        super().__init__()
        self.router = parts["router"]
        self.up_projs = nn.ModuleList(parts[f"experts.{e}.up_proj"] for e in range(block.experts))
        self.down_projs = nn.ModuleList(parts[f"experts.{e}.down_proj"] for e in range(block.experts))
        self.top_k = min(block.top_k, block.experts)

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        v = u.reshape(-1, u.shape[-1])  # [m, d]
        scores, chosen = self.router(v).topk(self.top_k, dim=-1)  # [m, top_k] each
        weights = scores.softmax(dim=-1)
        out = torch.zeros_like(v)
        for e, (up_proj, down_proj) in enumerate(zip(self.up_projs, self.down_projs, strict=True)):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, down_proj(F.gelu(up_proj(v[token]))) * weights[token, slot, None])
        return out.reshape(u.shape), ()
