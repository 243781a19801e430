"""The gate and the grouped RMSNorm behind the scan of Mamba-2.

Dimensions: `I` inner, `G` groups of neighbouring channels, each normalised by itself.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import calls

GateOrder = Literal["gate_first", "norm_first"]


def gated_norm_reference(
    y: Tensor, z: Tensor, weight: Tensor | None, groups: int = 1, eps: float = 0.0, order: GateOrder = "gate_first"
) -> Tensor:
    """`y [..., I]`, gated by SiLU of `z [..., I]` and normalised, times `weight [I]`; differentiable.

    weight: None: there is no norm. Source: `RMSNormGated` of mamba_ssm, `norm_before_gate` being `norm_first`.
    """
    gate = F.silu(z)
    if weight is None:
        return y * gate
    values = (y * gate if order == "gate_first" else y).unflatten(-1, (groups, -1))  # [..., G, I/G]
    normed = F.rms_norm(values, values.shape[-1:], eps=eps).flatten(-2) * weight
    return normed if order == "gate_first" else normed * gate


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor | None, groups: int = 1, eps: float = 0.0, order: GateOrder = "gate_first"
) -> Tensor:
    """The same by the fastest way there is; arguments as in `gated_norm_reference`."""
    if calls.usable(y, z) and (weight is None or calls.usable(weight)):
        return calls.gated_norm(y, z, weight, groups, eps, weight is not None and order == "norm_first")
    return gated_norm_reference(y, z, weight, groups, eps, order)
