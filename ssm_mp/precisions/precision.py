"""Precisions: how one tensor is stored, how many bytes that takes, and how it is computed with.

A precision is a small class in a file of its own, and a line of `registry.py`. `arrays` says what it stores for a
tensor of some shape (this one list gives the predicted bytes, the artifact's layout and the check at load), `store`
quantises, `restore` wraps stored arrays. Both return a `Stored` module, whose `tensor()` is the float32 value to
compute with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions.quantize import FLOAT16_LARGEST
from ssm_mp.precisions.slices import in_slices, largest_magnitude
from ssm_mp.precisions.stored import ArraySpec, ByteTensor, FloatTensor, Role, Stored
from ssm_mp.scheme import ScaleRule


class Unsure(Enum):
    """Neither a refusal nor none: whether a tensor can be held, only storing it tells."""

    UNSURE = "only storing it tells"


class Precision(ABC):
    """How a tensor is held. Instances have no state; `name` is what maps and files say.

    Whatever the precision, a bias is float16 and an index is the bytes that it is.
    """

    name: str
    bits: int
    """Bits of a stored value, scales left out."""
    quantizes_inputs: bool
    """Whether a linear layer of this precision takes part in the study's activation scheme: its weights are then stored
    as an `IntegerTensor`, which multiplies int8 inputs."""
    takes_any_float = False
    """Whether `_store` takes a tensor of any float type, and never copies the whole of it; else it is given float32."""

    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        """What is stored for a tensor: suffix → array."""
        if role in ("bias", "index"):
            return {"": ArraySpec(shape, torch.float16 if role == "bias" else torch.uint8)}
        return self._arrays(shape, role)

    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        """A tensor of any float type in this precision: what its values in float32 give.

        Raises InfeasibleError, with the reason, where it does not fit.
        """
        if role in ("bias", "index"):
            return stored_half(tensor) if role == "bias" else ByteTensor(tensor)
        return self._store(tensor if self.takes_any_float else tensor.float(), role, rule)

    def refusal(self, largest: float, role: Role, rule: ScaleRule) -> str | Unsure | None:
        """Why `store` would refuse a tensor whose largest magnitude is `largest`, in its words; None where it would
        not. Finite values are taken for granted."""
        if role == "index":
            return None
        return half_refusal(largest) if role == "bias" else self._refusal(largest, rule)

    def restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...], role: Role) -> Stored:
        """What `store` returned for a tensor of this shape, from its arrays."""
        if role in ("bias", "index"):
            return FloatTensor(arrays[""]) if role == "bias" else ByteTensor(arrays[""])
        return self._restore(arrays, shape)

    def bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Stored bytes of a tensor, scales included."""
        return sum(array.bytes for array in self.arrays(shape, role).values())

    @abstractmethod
    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        """`arrays` of a weight or vector."""

    @abstractmethod
    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        """`store` of a weight or vector; of float32 unless `takes_any_float`."""

    def _refusal(self, largest: float, rule: ScaleRule) -> str | Unsure | None:
        """`refusal` of a weight or vector. A precision that can tell says so itself."""
        return Unsure.UNSURE

    @abstractmethod
    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        """`restore` of a weight or vector."""


def stored_half(tensor: Tensor) -> FloatTensor:
    """A tensor stored float16. Raises InfeasibleError where a value overflows."""
    flat = tensor.reshape(-1)
    half = torch.empty(tensor.shape, dtype=torch.float16, device=tensor.device)
    held = half.view(-1)

    def fits(part: slice) -> bool:
        return bool(held[part].copy_(flat[part]).isfinite().all())

    if not all(in_slices(fits, flat.numel(), 1, tensor.device)):
        raise InfeasibleError(_above_float16(largest_magnitude(tensor)))
    return FloatTensor(half)


def half_refusal(largest: float) -> str | None:
    """Why `stored_half` would refuse a tensor whose largest magnitude is `largest`; None where it would not."""
    return None if torch.tensor(largest).half().isfinite() else _above_float16(largest)


def _above_float16(largest: float) -> str:
    return f"its largest value, {largest:.4g}, is above float16's, {FLOAT16_LARGEST:.0f}"
