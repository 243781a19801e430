"""Precisions: how one tensor is stored, how many bytes that takes, and how it is computed with.

A precision is a small class. `arrays` says what it stores for a tensor of some shape (this one list
gives the predicted bytes, the artifact's layout and the check at load), `store` quantises, `restore`
wraps stored arrays. Both return a `Stored` module, whose `tensor()` is the float32 value to compute with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ssm_mp.config import Role
from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.quantize import ScaleRule, dequantize_rows, quantize_rows, weight_scales

FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one stored array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Stored(nn.Module, ABC):
    """One tensor as it is stored."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The whole tensor, float32, to compute with."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of a matrix `[r, n]` by `index [...]`, float32 `[..., n]`, without unpacking the others."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """The stored arrays by suffix; the empty suffix is the tensor's own name."""


class FloatTensor(Stored):
    """A tensor stored in a floating-point type."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    def tensor(self) -> Tensor:
        return self.value.float()

    def rows(self, index: Tensor) -> Tensor:
        return self.value[index].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"": self.value.data}


class Int8Tensor(Stored):
    """A tensor stored as int8 with one float16 scale a row, a row being one index of the first dimension.

    A vector has a single scale.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def tensor(self) -> Tensor:
        rows = self.q.reshape(self.scale.shape[0], -1)
        return dequantize_rows(rows, self.scale).reshape(self.q.shape)

    def rows(self, index: Tensor) -> Tensor:
        return self.q[index].float() * self.scale[index].float()[..., None]

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class Precision(ABC):
    """How a tensor of some role is held. Instances have no state; `name` is what maps and files say."""

    name: str
    quantizes_inputs: bool
    """Whether a linear layer of this precision takes part in the study's activation scheme."""

    @abstractmethod
    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        """What is stored for a tensor: suffix → array."""

    @abstractmethod
    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        """A float32 tensor in this precision. Raises InfeasibleError, with the reason, where it does not fit."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, Tensor], role: Role) -> Stored:
        """What `store` returned, from its arrays."""

    def bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Stored bytes of a tensor, scales included."""
        return sum(array.bytes for array in self.arrays(shape, role).values())


class Float16(Precision):
    """Stored float16; computed in float16 on a GPU, in float32 on a CPU (native half is far slower there)."""

    name = "fp16"
    quantizes_inputs = False

    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        return {"": ArraySpec(shape, torch.float16)}

    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        half = tensor.half()
        if not bool(torch.isfinite(half).all()):
            largest = tensor.abs().max().item()
            raise InfeasibleError(f"its largest value, {largest:.4g}, is above float16's, {FLOAT16_LARGEST:.0f}")
        return FloatTensor(half)

    def restore(self, arrays: Mapping[str, Tensor], role: Role) -> Stored:
        return FloatTensor(arrays[""])


class Int8(Precision):
    """Weights int8, symmetric, a float16 scale per output channel (per row, or one for a vector); biases float16."""

    name = "int8"
    quantizes_inputs = True

    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        if role == "bias":
            return FP16.arrays(shape, role)
        scales = shape[0] if role == "weight" else 1
        return {"q": ArraySpec(shape, torch.int8), "scale": ArraySpec((scales,), torch.float16)}

    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        if role == "bias":
            return FP16.store(tensor, role, rule)
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        scale = weight_scales(rows, rule)
        return Int8Tensor(quantize_rows(rows, scale).reshape(tensor.shape), scale)

    def restore(self, arrays: Mapping[str, Tensor], role: Role) -> Stored:
        if role == "bias":
            return FP16.restore(arrays, role)
        return Int8Tensor(arrays["q"], arrays["scale"])


FP16 = Float16()
INT8 = Int8()

PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (FP16, INT8)}
"""Every precision by name, the widest first."""


def get_precision(name: str) -> Precision:
    """The precision of a name; raises PrecisionMapError with the known names."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise PrecisionMapError(f"unknown precision {name!r}; known are {', '.join(map(repr, PRECISIONS))}") from None
