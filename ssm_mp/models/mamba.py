"""One layer of family `mamba` (Mamba-1; Gu & Dao 2023, section 3.4; transformers' MambaMixer.slow_forward).

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.config import MambaConfig
from ssm_mp.models.language_model import Parts
from ssm_mp.models.scan import Scan, selective_scan


class MambaMixer(nn.Module):
    """Norm, gated convolution, selective scan, projection."""

    def __init__(self, config: MambaConfig, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.sizes = (config.dt_rank, config.d_state, config.d_state)
        self.scan = scan
        self.norm = parts["norm"]
        self.in_proj = parts["in_proj"]
        self.conv1d = parts["conv1d"]
        self.x_proj = parts["x_proj"]
        self.dt_proj = parts["dt_proj"]
        self.A_log = parts.value("A_log")
        self.D = parts.value("D")
        self.out_proj = parts["out_proj"]

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → the mixer's output `[b, l, d]`, before the residual."""
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # [b, l, I] each
        a = F.silu(self.conv1d(a))
        dt, B, C = self.x_proj(a).split(self.sizes, dim=-1)  # [b, l, R], [b, l, N], [b, l, N]  # noqa: N806
        delta = F.softplus(self.dt_proj(dt))  # [b, l, I]
        A = -torch.exp(self.A_log.tensor())  # [I, N]  # noqa: N806
        y = self.scan(a, delta, A, B, C, self.D.tensor())
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


class MambaLayer(nn.Module):
    """One residual layer."""

    def __init__(self, config: MambaConfig, parts: Parts, scan: Scan = selective_scan) -> None:
        super().__init__()
        self.ssm = MambaMixer(config, parts.within("ssm"), scan)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`."""
        mixed: Tensor = self.ssm(x)
        return x + mixed
