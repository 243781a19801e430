"""A stored weight as the kernels read it: products of few rows, for which it is unpacked on the way and never whole.

Dimensions: `m` rows, `k` inputs and `n` outputs of a product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssm_mp.kernels import decoding
from ssm_mp.stored import FloatTensor, GroupedTensor, Int8Tensor, Stored

FEW_ROWS = 8
"""Up to so many rows wait for the weight to be read; with more, unpacking it once for all pays."""

Inputs = Literal["none", "static", "dynamic"]
_INPUTS = {"none": decoding.AS_THEY_ARE, "static": decoding.STATIC, "dynamic": decoding.DYNAMIC}
_FLOATS = {torch.float32: decoding.FLOAT32, torch.float16: decoding.FLOAT16}


class Matrix:
    """A weight `[n, k]` with its bias; `structure` is what the kernels take, valid for as long as this lives."""

    def __init__(
        self, weight: Stored, bias: Stored | None = None, inputs: Inputs = "none", input_scale: float = 0.0
    ) -> None:
        """Nothing is copied but vectors. inputs, input_scale: how those of an int8 weight are quantised."""
        self._held: list[Tensor] = []
        values, kind = _values(weight)
        scales: int | None = None
        sums: int | None = None
        levels: int | None = None
        if isinstance(weight, Int8Tensor):
            scales = self._at(weight.scale.float())
            sums = self._at(decoding.row_sums(weight.q.contiguous()))
        elif isinstance(weight, GroupedTensor):
            scales = self._at(weight.scale.float())
            book = weight.book.values
            levels = self._at(torch.tensor((*book, *[0.0] * (16 - len(book)))))
        n, k = weight.shape if isinstance(weight, GroupedTensor) else values.shape
        held_bias = None if bias is None else self._at(bias.tensor())
        self.structure = decoding.Matrix(
            kind, _INPUTS[inputs], n, k, self._at(values), scales, sums, held_bias, levels, input_scale
        )

    def product(self, x: Tensor) -> Tensor:
        """`x [m, k]`, float32, times the weight transposed, plus the bias: `[m, n]`."""
        return decoding.multiply(self.structure, x.contiguous())

    def unpacked(self) -> Tensor:
        """The weight as float32 `[n, k]`, the very numbers of `Stored.tensor`."""
        return decoding.unpack(self.structure)

    def _at(self, values: Tensor) -> int:
        """Where these values lie, kept alive."""
        self._held.append(values.detach().contiguous())
        return self._held[-1].data_ptr()


def _values(weight: Stored) -> tuple[Tensor, int]:
    """The stored numbers of a matrix, and which kind the kernels know them as."""
    match weight:
        case FloatTensor() if weight.value.dtype in _FLOATS:
            return weight.value.data, _FLOATS[weight.value.dtype]
        case Int8Tensor():
            return weight.q, decoding.INT8
        case GroupedTensor():
            return weight.q, decoding.CODES4 if weight.book.bits == 4 else decoding.CODES3
    raise AssertionError(f"{type(weight).__name__} is no matrix that the kernels know")
