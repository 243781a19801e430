"""A precision from outside the package: float8 with a scale a row. All that adding one takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.quantize import stored_scales
from ssm_mp.precisions.stored import ArraySpec, Role, Stored
from ssm_mp.scheme import ScaleRule

LARGEST = 448.0


class Float8Tensor(Stored):
    """A tensor as float8 (e4m3) `q`, with one float16 scale a row; a vector is one row."""

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def tensor(self) -> Tensor:
        rows = self.q.float().reshape(self.scale.shape[0], -1) * self.scale.float()[:, None]
        return rows.reshape(self.q.shape)

    def rows(self, index: Tensor) -> Tensor:
        return self.q[index].float() * self.scale[index].float()[..., None]

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class Float8(Precision):
    name = "fp8"
    bits = 8
    quantizes_inputs = False

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        scales = shape[0] if role == "weight" else 1
        return {"q": ArraySpec(shape, torch.float8_e4m3fn), "scale": ArraySpec((scales,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        scale = stored_scales(rows.abs().amax(dim=1) / LARGEST)
        q = (rows / scale.float()[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return Float8Tensor(q.reshape(tensor.shape), scale)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return Float8Tensor(arrays["q"], arrays["scale"])


FP8 = Float8()
