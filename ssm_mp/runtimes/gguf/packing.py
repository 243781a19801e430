"""Tensor types of GGUF: stored tensors of ours packed anew, code by code.

Dimensions: `n` rows, `k` values in a row, `b` blocks of 32 values in a row (k / 32).

Each block has a float16 scale: with 32 int8 codes in Q8_0, codes of five bits, less 16, in Q5_0, of four, less 8, in
Q4_0. Our int8 has one scale a row, so that all blocks of a row carry it; narrower integers have one a group of
32 values or more, counted through the whole tensor, so that a block lies within one group wherever rows are multiples
of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ssm_mp.errors import ExportError
from ssm_mp.precisions.grouped import INTEGER_BOOKS, GroupedTensor
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.runtimes.codes import codes_of, integers_of
from ssm_mp.runtimes.gguf.tensors import BLOCK

_OF_FLOATS = {"fp32": "F32", "fp16": "F16"}
_OF_BITS = {8: "Q8_0", 6: "Q8_0", 5: "Q5_0", 4: "Q4_0", 3: "Q4_0"}
_BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q5_0": 2 + BLOCK // 8 + BLOCK // 2, "Q4_0": 2 + BLOCK // 2}
_FLOATS = {"F32": np.float32, "F16": np.float16}


def word_for(precision: str) -> str | None:
    """The type of a matrix of a precision; None where none has the same values."""
    integers = integers_of(precision)
    return _OF_FLOATS.get(precision) if integers is None else _OF_BITS[integers.bits]


def row_bytes(word: str, k: int) -> int | None:
    """Bytes of a row of `k` values; None where the type does not hold such rows."""
    if word in _FLOATS:
        return k * np.dtype(_FLOATS[word]).itemsize
    return None if k % BLOCK else k // BLOCK * _BLOCK_BYTES[word]


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as a type holds it: floats `[n, k]` and no scales, or int8 codes `[n, b, 32]` and float16 scales
    `[n, b]`."""

    word: str
    values: np.ndarray
    scales: np.ndarray | None = None

    def taken(self, order: np.ndarray) -> Packed:
        """The rows of `order`."""
        scales = None if self.scales is None else self.scales[order]
        return Packed(self.word, self.values[order], scales)

    def arranged(self, columns: np.ndarray) -> Packed:
        """The same with its blocks of 32 columns in another order."""
        if self.scales is not None:
            return Packed(self.word, self.values[:, columns], self.scales[:, columns])
        n, k = self.values.shape
        return Packed(self.word, self.values.reshape(n, -1, BLOCK)[:, columns].reshape(n, k))

    def multiplied(self, factor: float) -> Packed:
        """The matrix times a number: codes stay, scales (or float16 values) are rounded anew."""
        if factor == 1.0:
            return self
        if self.scales is None:
            return Packed(self.word, _times(self.values, factor))
        return Packed(self.word, self.values, _times(self.scales, factor))

    def floats(self) -> np.ndarray:
        """What it stands for, float32 `[n, k]`."""
        if self.scales is None:
            return self.values.astype(np.float32)
        return (self.values.astype(np.float32) * self.scales.astype(np.float32)[..., None]).reshape(
            len(self.values), -1
        )

    def bytes(self) -> np.ndarray:
        """As the file holds it, uint8 `[n, bytes of a row]`."""
        if self.scales is None:
            return np.ascontiguousarray(self.values).view(np.uint8)
        codes: np.ndarray = self.values.view(np.uint8)
        if self.word == "Q4_0":
            codes = _halves((self.values + 8).astype(np.uint8))
        elif self.word == "Q5_0":  # the fifth bits of all 32 come first
            codes = (self.values + 16).astype(np.uint8)
            fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")  # [n, b, 4]
            codes = np.concatenate((fifth, _halves(codes & 15)), axis=-1)
        scales = np.ascontiguousarray(self.scales)[..., None].view(np.uint8)  # [n, b, 2]
        return np.concatenate((scales, codes), axis=-1).reshape(len(codes), -1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits `[n, b, 32]` → `[n, b, 16]`: the first 16 in the low halves of the bytes, the others above."""
    joined: np.ndarray = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return joined


def word_of(stored: Stored) -> str | None:
    """The type that holds a stored matrix; None where none does."""
    match stored:
        case FloatTensor():
            return {torch.float16: "F16", torch.float32: "F32"}.get(stored.value.dtype)
        case Int8Tensor():
            return "Q8_0"
        case GroupedTensor() if stored.book in INTEGER_BOOKS:
            return _OF_BITS[stored.book.bits]
    return None


def packed(stored: Stored) -> Packed:
    """A stored matrix `[n, k]` in its type. Raises ExportError where there is none."""
    word = word_of(stored)
    shape = tuple(stored.shape)
    if word is None or len(shape) != 2 or row_bytes(word, shape[1]) is None:
        raise ExportError(f"GGUF has no type for a {type(stored).__name__} of shape {list(shape)}")
    if isinstance(stored, FloatTensor):
        return Packed(word, stored.value.detach().cpu().numpy())
    codes = codes_of(stored)
    assert codes is not None
    values = codes.values().numpy().reshape(shape[0], -1, BLOCK)
    return Packed(word, values, np.repeat(codes.scale.numpy(), codes.group // BLOCK, axis=1))


def _times(values: np.ndarray, factor: float) -> np.ndarray:
    """Values times a number, rounded to their own type. Raises ExportError where it overflows."""
    with np.errstate(over="ignore"):
        product: np.ndarray = (values.astype(np.float32) * np.float32(factor)).astype(values.dtype)
    if not np.isfinite(product).all():
        raise ExportError(f"a matrix times {factor:g}, a multiplier of the model, is above float16's largest value")
    return product
