"""Precision `int8`: integers of one byte with a scale a row.

Dimensions: `r` rows, `n` values in a row, `m` inputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.quantize import (
    dequantize_rows,
    fits_product,
    integer_product,
    padded_weight,
    quantize_rows,
    weight_scales,
)
from ssm_mp.precisions.stored import ArraySpec, IntegerTensor, Role, Stored
from ssm_mp.scheme import ScaleRule


class Int8Tensor(IntegerTensor):
    """A tensor stored as int8 with one float16 scale a row, a row being one index of the first dimension.

    A vector has a single scale.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self._fits = fits_product(q.shape)
        self._padded: Tensor | None = None  # on a GPU, where it does not fit

    def product(self, a: Tensor) -> Tensor:
        """`a [m, n]`, int8, times this matrix transposed: int32 `[m, r]`.

        On a GPU, a matrix of sizes that its product does not take is padded once, at the first product.
        """
        q = self.q
        if self._fits or not q.is_cuda:
            return integer_product(a, q)
        if self._padded is None or self._padded.device != q.device:
            self._padded = padded_weight(q)
        return integer_product(a, self._padded)[:, : q.shape[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    def part(self, rows: slice) -> tuple[Stored, int]:
        return type(self)(self.q[rows], self.scale[rows]), 0

    def tensor(self) -> Tensor:
        rows = self.q.reshape(self.scale.shape[0], -1)
        return dequantize_rows(rows, self.scale).reshape(self.q.shape)

    def rows(self, index: Tensor) -> Tensor:
        return self.q[index].float() * self.scale[index].float()[..., None]

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


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


INT8 = Int8()
