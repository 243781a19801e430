"""Causal depthwise convolutions.

Dimensions: `b` batch, `l` length, `I` channels, `K` kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.kernels import calls
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.precisions.stored import Stored


class DepthwiseConv(nn.Module):
    """Causal depthwise convolution along the length, then SiLU if so told; weight-only in every precision."""

    def __init__(self, weight: Stored, bias: Stored | None, *, activation: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.weight = weight
        self.bias = bias
        self._taps = Unpacked(lambda tensor: tensor[:, 0, :].t().contiguous().t())  # as the kernels read them
        self._offsets = Unpacked()

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x [b, l, I]`, and the inputs `[b, K−1, I]` before it (None: zeros) → `[b, l, I]`, and its last inputs."""
        weight = self._taps(self.weight)  # [I, K]
        bias = None if self.bias is None else self._offsets(self.bias)
        width = weight.shape[1] - 1
        if before is None:
            before = x.new_zeros(x.shape[0], width, x.shape[2])
        # copied, or the whole of what `x` is a part of would live on with it
        last = x[:, -width:].clone() if x.shape[1] >= width > 0 else torch.cat((before, x), dim=1)[:, x.shape[1] :]
        if not self.activation:
            convolution = calls.convolved if calls.usable(x, weight, before) else convolved
            return convolution(x, weight, bias, before), last
        kernels = kernels_for(x, weight, before)
        if kernels is not None:
            return kernels.conv_silu(x, weight, bias, before), last
        return conv_silu_reference(x, weight, bias, before), last


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """The convolution of `x [b, l, I]` by `weight [I, K]`, after the inputs `before [b, K−1, I]`.

    K shifted products, which need no transposed copy of `x`; differentiable.
    """
    kernel, length = weight.shape[1], x.shape[1]
    padded = torch.cat((before, x), dim=1)  # [b, l + K − 1, I]
    y = padded[:, :length] * weight[:, 0]
    for k in range(1, kernel):
        y = torch.addcmul(y, padded[:, k : k + length], weight[:, k])
    return y if bias is None else y + bias


def conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of `convolved`."""
    return F.silu(convolved(x, weight, bias, before))


@dataclass(frozen=True)
class ConvolutionForm:
    """A causal depthwise convolution. activation: followed by SiLU."""

    activation: bool = True

    @property
    def multiplies_inputs(self) -> bool:
        return False

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        return DepthwiseConv(tensors["weight"], tensors.get("bias"), activation=self.activation)
