"""Precisions: how one tensor is stored, how many bytes that takes, and how it is computed with.

A precision is a small class. `arrays` says what it stores for a tensor of some shape (this one list
gives the predicted bytes, the artifact's layout and the check at load), `store` quantises, `restore`
wraps stored arrays. Both return a `Stored` module, whose `tensor()` is the float32 value to compute with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.precisions.groups import (
    GROUP,
    INT3_BOOK,
    INT4_BOOK,
    NF4_BOOK,
    CodeBook,
    group_count,
    group_scales,
    nearest_codes,
    pack,
    to_groups,
)
from ssm_mp.precisions.quantize import quantize_rows, weight_scales
from ssm_mp.precisions.stored import ArraySpec, ByteTensor, FloatTensor, GroupedTensor, Int8Tensor, Role, Stored
from ssm_mp.scheme import ScaleRule

FLOAT16_LARGEST = 65504.0


class Precision(ABC):
    """How a tensor is held. Instances have no state; `name` is what maps and files say.

    Whatever the precision, a bias is float16 and an index is the bytes that it is.
    """

    name: str
    bits: int
    """Bits of a code, scales left out."""
    quantizes_inputs: bool
    """Whether a linear layer of this precision takes part in the study's activation scheme."""

    def arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        """What is stored for a tensor: suffix → array."""
        if role in ("bias", "index"):
            return {"": ArraySpec(shape, torch.float16 if role == "bias" else torch.uint8)}
        return self._arrays(shape, role)

    def store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        """A float32 tensor in this precision. Raises InfeasibleError, with the reason, where it does not fit."""
        if role in ("bias", "index"):
            return _half(tensor) if role == "bias" else ByteTensor(tensor)
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


def _half(tensor: Tensor) -> FloatTensor:
    """A tensor stored float16. Raises InfeasibleError where a value overflows."""
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        largest = tensor.abs().max().item()
        raise InfeasibleError(f"its largest value, {largest:.4g}, is above float16's, {FLOAT16_LARGEST:.0f}")
    return FloatTensor(half)


class Float16(Precision):
    """Stored float16; computed in float16 on a GPU, in float32 on a CPU (native half is far slower there)."""

    name = "fp16"
    bits = 16
    quantizes_inputs = False

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        return {"": ArraySpec(shape, torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        return _half(tensor)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return FloatTensor(arrays[""])


class Int8(Precision):
    """Weights int8, symmetric, a float16 scale per output channel (per row, or one for a vector)."""

    name = "int8"
    bits = 8
    quantizes_inputs = True

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        scales = shape[0] if role == "weight" else 1
        return {"q": ArraySpec(shape, torch.int8), "scale": ArraySpec((scales,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        scale = weight_scales(rows, rule)
        return Int8Tensor(quantize_rows(rows, scale).reshape(tensor.shape), scale)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return Int8Tensor(arrays["q"], arrays["scale"])


class Grouped(Precision):
    """Codes of a book, packed, a float16 scale for each 64 values; inputs of a product stay as they are."""

    quantizes_inputs = False

    def __init__(self, name: str, book: CodeBook) -> None:
        self.name = name
        self.bits = book.bits
        self.book = book

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        groups = group_count(prod(shape))
        packed = ArraySpec((groups, GROUP * self.book.bits // 8), torch.uint8)
        return {"q": packed, "scale": ArraySpec((groups,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        groups = to_groups(tensor)
        scale = group_scales(groups, rule, self.book)
        packed = pack(nearest_codes(groups, scale, self.book), self.book.bits)
        return GroupedTensor(packed, scale, tuple(tensor.shape), self.book)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return GroupedTensor(arrays["q"], arrays["scale"], shape, self.book)


FP16 = Float16()
INT8 = Int8()
NF4 = Grouped("nf4", NF4_BOOK)
INT4 = Grouped("int4", INT4_BOOK)
INT3 = Grouped("int3", INT3_BOOK)

PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (FP16, INT8, NF4, INT4, INT3)}
"""Every precision by name, in the order of `ssm_mp.scheme.PRECISION_NAMES`."""
FOUR_BIT = (NF4.name, INT4.name)
"""The precisions of 4 bits, the better one on normally distributed weights first."""


def get_precision(name: str) -> Precision:
    """The precision of a name; raises PrecisionMapError with the known names."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise PrecisionMapError(f"unknown precision {name!r}; known are {', '.join(map(repr, PRECISIONS))}") from None
