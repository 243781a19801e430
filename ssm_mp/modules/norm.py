"""LayerNorm and RMSNorm.

Dimensions: `d` the width that is normalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.kernels import calls
from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.modules.parameter import Parameter, bias
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.precisions.stored import Stored

NormKind = Literal["layer", "rms"]


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm (without) over the last dimension."""

    def __init__(self, weight: Stored, bias: Stored | None, eps: float, *, one_plus: bool = False) -> None:
        """one_plus: what is stored is the weight less one."""
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.one_plus = one_plus
        self._factors, self._offsets = (Unpacked(_one_more) if one_plus else Unpacked()), Unpacked()

    def factors(self) -> Tensor:
        """What the normalised values are multiplied with, `[d]`."""
        return self._factors(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d]` → `[..., d]`."""
        weight = self.factors()
        bias = None if self.bias is None else self._offsets(self.bias)
        if calls.usable(x, weight):
            return calls.normalise(x, weight, bias, self.eps)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def _one_more(weight: Tensor) -> Tensor:
    return weight + 1


@dataclass(frozen=True)
class NormForm:
    """A norm: `layer` has a bias, `rms` has none. one_plus: what is stored is the weight less one (Qwen3-Next)."""

    eps: float
    kind: NormKind = "rms"
    one_plus: bool = False

    @property
    def multiplies_inputs(self) -> bool:
        return False

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        return Norm(tensors["weight"], tensors.get("bias"), self.eps, one_plus=self.one_plus)

    def parameters(self, component: str, layer: int | None, size: int) -> Iterator[Parameter]:
        """The tensors of a norm over `size` values."""
        yield Parameter(f"{component}.weight", (size,), component, "norm", layer, "vector", self)
        if self.kind == "layer":
            yield bias(component, "norm", layer, self, size)
