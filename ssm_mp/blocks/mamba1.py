"""One layer of family `mamba` (Mamba-1; Gu & Dao 2023, section 3.4; transformers' MambaMixer.slow_forward).

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssm_mp.blocks.mamba1_compiled import CompiledLayer, Observer
from ssm_mp.config import MambaConfig
from ssm_mp.kernels import calls
from ssm_mp.kernels.scan import Scan, selective_scan
from ssm_mp.model import LayerState, Parts
from ssm_mp.modules.layers import Linear, Unpacked
from ssm_mp.precisions.matrix import FEW_ROWS
from ssm_mp.precisions.stored import Stored


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
        self._A = Unpacked(lambda tensor: -torch.exp(tensor).t().contiguous().t())  # [I, N]
        self._skip = Unpacked()  # [I]

    def forward(self, x: Tensor, before: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """`x [b, l, d]` → the mixer's output `[b, l, d]`, before the residual, and the state after its last token."""
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # [b, l, I] each
        a, inputs = self.conv1d(a, None if before is None else before.conv)
        dt, B, C = self.x_proj(a).split(self.sizes, dim=-1)  # [b, l, R], [b, l, N], [b, l, N]  # noqa: N806
        state = None if before is None else before.scan
        y, last = self.scan(a, self.dt_proj(dt), self._A(self.A_log), B, C, self._skip(self.D), z, state)
        return self.out_proj(y), LayerState(inputs, last)


class MambaLayer(nn.Module):
    """One residual layer; `observer` is told where a compiled call of it spends its time."""

    def __init__(self, config: MambaConfig, parts: Parts, scan: Scan = selective_scan) -> None:
        super().__init__()
        self.observer: Observer | None = None
        self.ssm = MambaMixer(config, parts.within("ssm"), scan)
        self._compiled: tuple[object, CompiledLayer | None, object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # addresses cannot be copied

    def compiled(self) -> CompiledLayer | None:
        """The layer as one call, made once; None where there is no such way, or another scan is asked for."""
        if self.ssm.scan is not selective_scan:
            return None
        stored = [module for module in self.modules() if isinstance(module, Stored)]
        if any(tensor.is_trained for tensor in stored):
            return None
        projections = (self.ssm.in_proj, self.ssm.x_proj, self.ssm.dt_proj, self.ssm.out_proj)
        inputs = [module.inputs_stamp for module in projections if isinstance(module, Linear)]
        stamp = ([tensor.stamp for tensor in stored], inputs)
        current = self._compiled
        if current is None or current[0] != stamp:
            # what was read is held too: another tensor in its place would have its stamp
            current = (stamp, CompiledLayer.of(self.ssm), [tensor.arrays() for tensor in stored])
            self._compiled = current
        return current[1]

    def carry(self, x: Tensor, before: LayerState | None) -> tuple[Tensor, LayerState]:
        """`x [b, l, d]`, and the state before it (None: the beginning) → `[b, l, d]`, and the state after it."""
        if calls.usable(x) and x.shape[0] * x.shape[1] > FEW_ROWS:
            compiled = self.compiled()
            if compiled is not None:
                return compiled(x, before, self.observer)
        mixed, state = self.ssm(x, before)
        return x + mixed, state

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, from the beginning."""
        return self.carry(x, None)[0]
