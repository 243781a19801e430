"""Precisions: how one tensor is stored, how many bytes that takes, and how it is computed with.

A precision is a small class in a file of its own, and a line of `registry.py`. `arrays` says what it stores for a
tensor of some shape (this one list gives the predicted bytes, the artifact's layout and the check at load), `store`
quantises, `restore` wraps stored arrays. Both return a `Stored` module, whose `tensor()` is the float32 value to
compute with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions.stored import ArraySpec, ByteTensor, FloatTensor, Role, Stored
from ssm_mp.scheme import ScaleRule

FLOAT16_LARGEST = 65504.0


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

    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        """What is stored for a tensor: suffix → array."""
        if role in ("bias", "index"):
            return {"": ArraySpec(shape, torch.float16 if role == "bias" else torch.uint8)}
        return self._arrays(shape, role)

    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        """A float32 tensor in this precision. Raises InfeasibleError, with the reason, where it does not fit."""
        if role in ("bias", "index"):
            return stored_half(tensor) if role == "bias" else ByteTensor(tensor)
        return self._store(tensor, role, rule)

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
        """`store` of a weight or vector."""

    @abstractmethod
    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        """`restore` of a weight or vector."""


def stored_half(tensor: Tensor) -> FloatTensor:
    """A tensor stored float16. Raises InfeasibleError where a value overflows."""
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        largest = tensor.abs().max().item()
        raise InfeasibleError(f"its largest value, {largest:.4g}, is above float16's, {FLOAT16_LARGEST:.0f}")
    return FloatTensor(half)
