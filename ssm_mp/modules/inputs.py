"""How the inputs of a product are quantised.

Dimensions: `m` tokens, `k` inputs of a product.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssm_mp.kernels import calls, cuda
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.precisions.matrix import SMALLEST_SCALE
from ssm_mp.precisions.quantize import INT8_LIMIT, quantize_tensor


class StaticInput(nn.Module):
    """Quantises the inputs of a linear layer with one scale, calibrated beforehand."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)  # float16 [1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [m, k]` → int8 `[m, k]` and its float32 scale, once for each row, `[m, 1]`."""
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


InputQuantizer = StaticInput | DynamicInput
