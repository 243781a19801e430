"""How the inputs of a product are quantised.

Dimensions: `m` tokens, `k` inputs of a product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ssm_mp.kernels import calls, cuda
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.precisions.matrix import SMALLEST_SCALE
from ssm_mp.precisions.quantize import INT8_LIMIT, powers_of_two, quantize_tensor
from ssm_mp.scheme import ActivationScheme

BLOCK = 32
"""Inputs that share a scale in llama.cpp's 8-bit blocks."""


class StaticInput(nn.Module):
    """Quantises the inputs of a linear layer with one scale, calibrated beforehand.

    exponent: of the powers of two that each input is divided by first, int8 `[k]`, those that the weight's columns are
    multiplied with; None: none is.
    """

    scale: Tensor
    exponent: Tensor | None

    def __init__(self, scale: Tensor, exponent: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)  # float16 [1]
        self.register_buffer("exponent", exponent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [m, k]` → int8 `[m, k]` and its float32 scale, once for each row, `[m, 1]`."""
        x = x if self.exponent is None else x * powers_of_two(-self.exponent)
        if calls.usable(x):
            return calls.quantize_static(x, self.scale.item())
        if cuda.usable(x):
            return cuda.quantize_static(x, self.scale)  # reading its value would wait for the GPU
        scale = self.scale.float()
        # NaN and infinity have no int8 value: let them spoil their row's scale instead of vanishing
        return quantize_tensor(x, scale), scale + 0.0 * x.sum(dim=1, keepdim=True)


class DynamicInput(nn.Module):
    """Quantises the inputs of a linear layer with one scale a token, taken from the token itself."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [m, k]` → int8 `[m, k]` and float32 scales `[m, 1]`."""
        kernels = kernels_for(x)
        if kernels is not None:
            return kernels.quantize_dynamic(x, SMALLEST_SCALE)
        scale = (x.abs().amax(dim=1, keepdim=True) / INT8_LIMIT).clamp_(min=SMALLEST_SCALE)
        return quantize_tensor(x, scale), scale


class Rounding(nn.Module, ABC):
    """Rounds the inputs of a product and leaves them floats, as a runtime does that does not multiply integers ours."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`x [..., k]` → the same, rounded: float32."""


class BlockInput(Rounding):
    """To 8 bits in blocks of 32 with a float16 scale each (llama.cpp, `quantize_row_q8_0`), of a quantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.float().unflatten(-1, (-1, BLOCK))  # [..., blocks, 32]
        scale = blocks.abs().amax(dim=-1, keepdim=True) / INT8_LIMIT
        # rounded by the exact scale, restored by the stored one; a block of zeros has none
        integers: Tensor = torch.where(scale > 0, (blocks * (1 / scale)).round(), 0.0)
        restored: Tensor = (integers * scale.half().float()).flatten(-2)
        return restored


class HalfInput(Rounding):
    """To float16, of a float16 weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x.half().float()


class Multiplied(Rounding):
    """Rounds, and multiplies what is rounded: for a runtime that multiplies the product afterwards."""

    def __init__(self, rounding: Rounding, by: float) -> None:
        super().__init__()
        self.rounding = rounding
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.rounding(x) * self.by
        return product


InputQuantizer = StaticInput | DynamicInput | Rounding


def input_quantizer(scheme: ActivationScheme, precision: str) -> InputQuantizer | None:
    """How inputs are quantised for a weight of a precision, by a scheme that needs no calibration; None where not."""
    if scheme == "blocks":
        return HalfInput() if precision == "fp16" else BlockInput()
    return DynamicInput() if scheme == "dynamic" else None


def rounded(quantizer: InputQuantizer, x: Tensor) -> Tensor:
    """What a product takes in place of its inputs `x [m, k]`: float32 `[m, k]`."""
    if isinstance(quantizer, Rounding):
        found: Tensor = quantizer(x)
        return found
    integers, scale = quantizer(x)
    product: Tensor = integers.float() * scale
    scaled = quantizer.exponent if isinstance(quantizer, StaticInput) else None
    return product if scaled is None else product * powers_of_two(scaled)
