"""One layer of family `itera` (design, section 4): a small SSM, then a feed-forward or experts.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `X` experts, `m` tokens (`b·l`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.config import IteraLayer as LayerSizes
from ssm_mp.kernels.scan import Scan, shared_step_scan
from ssm_mp.model import LayerState, Parts


class SharedStepSSM(nn.Module):
    """The state-space core: one step size a token, a state of N shared by all channels."""

    def __init__(self, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        self.delta_proj = parts["delta_proj"]
        self.A_log = parts.value("A_log")
        self.B = parts.value("B")
        self.C = parts.value("C")
        self.D = parts.value("D")

    def forward(self, a: Tensor, z: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """`a, z [b, l, I]` and the state before → `[b, l, I]`, gated by `z`, and the last state."""
        A = -torch.exp(self.A_log.tensor())  # [N]  # noqa: N806
        return self.scan(a, self.delta_proj(a), A, self.B.tensor(), self.C.tensor(), self.D.tensor(), z, state)


class IteraMixer(nn.Module):
    """Norm, gated convolution, state-space core, projection."""

    def __init__(self, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.norm = parts["norm"]
        self.in_proj = parts["in_proj"]
        self.conv1d = parts["conv1d"]
        self.ssm = SharedStepSSM(parts.within("ssm"), scan)
        self.out_proj = parts["out_proj"]

    def forward(self, x: Tensor, before: LayerState | None) -> tuple[Tensor, LayerState]:
        """`x [b, l, d]` → the mixer's output `[b, l, d]`, before the residual, and the state after its last token."""
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # [b, l, I] each
        a, inputs = self.conv1d(a, None if before is None else before.conv)
        y, last = self.ssm(a, z, None if before is None else before.scan)
        return self.out_proj(y), LayerState(inputs, last)


class FeedForward(nn.Module):
    """`w2(GELU(w1(v)))`, the plain feed-forward or one expert."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.w1 = parts["w1"]
        self.w2 = parts["w2"]

    def forward(self, v: Tensor) -> Tensor:
        """`v [..., d]` → `[..., d]`."""
        out: Tensor = self.w2(F.gelu(self.w1(v)))
        return out


class Router(nn.Module):
    """The gate that scores the experts for each token."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.gate = parts["gate"]

    def forward(self, v: Tensor) -> Tensor:
        """`v [m, d]` → logits `[m, X]`."""
        logits: Tensor = self.gate(v)
        return logits


class Experts(nn.Module):
    """Each token goes to its `top_k` best experts, weighted by a softmax over those."""

    def __init__(self, count: int, top_k: int, parts: Parts) -> None:
        super().__init__()
        self.norm = parts["norm"]
        self.router = Router(parts.within("router"))
        self.experts = nn.ModuleList(FeedForward(parts.within(f"experts.{e}")) for e in range(count))
        self.top_k = min(top_k, count)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → the experts' weighted sum `[b, l, d]`, before the residual."""
        v = self.norm(x).reshape(-1, x.shape[-1])  # [m, d]
        scores, chosen = self.router(v).topk(self.top_k, dim=-1)  # [m, top_k] each
        weights = scores.softmax(dim=-1)
        out = torch.zeros_like(v)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(v[token]) * weights[token, slot, None])
        return out.reshape(x.shape)


class PlainFeedForward(nn.Module):
    """Norm and feed-forward of a layer without experts."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.norm = parts["norm"]
        self.ffn = FeedForward(parts.within("ffn"))

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, before the residual."""
        out: Tensor = self.ffn(self.norm(x))
        return out


class ExpertBranch(nn.Module):
    """Holds the experts under the name that the checkpoints use, `moe.layer`."""

    def __init__(self, sizes: LayerSizes, top_k: int, parts: Parts) -> None:
        super().__init__()
        self.layer = Experts(sizes.experts, top_k, parts.within("layer"))

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, before the residual."""
        out: Tensor = self.layer(x)
        return out


class IteraLayer(nn.Module):
    """One layer: SSM with residual, then feed-forward or experts with residual."""

    def __init__(self, sizes: LayerSizes, top_k: int, parts: Parts, scan: Scan = shared_step_scan) -> None:
        super().__init__()
        self.ssm = IteraMixer(parts.within("ssm"), scan)
        branch = parts.within("moe")
        self.moe = ExpertBranch(sizes, top_k, branch) if sizes.experts else PlainFeedForward(branch)

    def carry(self, x: Tensor, before: LayerState | None) -> tuple[Tensor, LayerState]:
        """`x [b, l, d]`, and the state before it (None: the beginning) → `[b, l, d]`, and the state after it."""
        mixed, state = self.ssm(x, before)
        x = x + mixed
        return x + self.moe(x), state

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, from the beginning."""
        return self.carry(x, None)[0]
