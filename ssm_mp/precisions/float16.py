"""Precision `fp16`: float16, as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.precisions.precision import Precision, half_refusal, stored_half
from ssm_mp.precisions.stored import ArraySpec, FloatTensor, Role, Stored
from ssm_mp.scheme import ScaleRule


class Float16(Precision):
    """Stored float16; computed in float16 on a GPU, in float32 on a CPU (native half is far slower there)."""

    name = "fp16"
    bits = 16
    quantizes_inputs = False
    takes_any_float = True

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        return {"": ArraySpec(shape, torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        return stored_half(tensor)

    def _refusal(self, largest: float, rule: ScaleRule) -> str | None:
        return half_refusal(largest)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return FloatTensor(arrays[""])


FP16 = Float16()
