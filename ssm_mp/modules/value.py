"""Components that are a bare stored value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.precisions.stored import Stored


@dataclass(frozen=True)
class ValueForm:
    """A bare value without a product of its own, such as `A_log`: the stored tensor itself."""

    @property
    def multiplies_inputs(self) -> bool:
        return False

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        (value,) = tensors.values()
        return value
