"""A stored weight as the kernels read it: products of few rows, for which it is unpacked on the way and never whole,
and products of many rows where the CPU has instructions for them.

Dimensions: `m` rows, `k` inputs and `n` outputs of a product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssm_mp.kernels import matrices
from ssm_mp.precisions.stored import FloatTensor, GroupedTensor, Int8Tensor, Stored

FEW_ROWS = 8
"""Up to so many rows wait for the weight to be read; with more, unpacking it once for all pays."""

Inputs = Literal["none", "static", "dynamic"]
_INPUTS = {"none": matrices.AS_THEY_ARE, "static": matrices.STATIC, "dynamic": matrices.DYNAMIC}
_FLOATS = {torch.float32: matrices.FLOAT32, torch.float16: matrices.FLOAT16}

SMALLEST_SCALE = 1e-12
"""Keeps the dynamic scale of an all-zero input away from zero."""
_SMALL = 1 << 18
"""Values of a matrix up to which an integer product here is faster than oneDNN's, measured with AMX."""
_LEAST_FLOATS = (256, 64)
"""Outputs and inputs from which on splitting the inputs of a float16 product pays, measured with AMX."""
_PACKED_BYTES = {matrices.INT8: 1, matrices.FLOAT16: 4}
_MOST_PACKED = 3 << 26
"""Bytes up to which each thread may lay out a whole head of its own, anew for its every share of the windows."""


class Matrix:
    """A weight `[n, k]` with its bias; `structure` is what the kernels take, valid for as long as this lives."""

    def __init__(
        self, weight: Stored, bias: Stored | None = None, inputs: Inputs = "none", input_scale: float = 0.0
    ) -> None:
        """Nothing is copied but vectors.

        inputs: how those of an int8 weight are quantised; input_scale: that of static ones.
        """
        self._held: list[Tensor] = []
        values, kind = _values(weight)
        scales: int | None = None
        sums: int | None = None
        levels: int | None = None
        if isinstance(weight, Int8Tensor):
            scales = self._at(weight.scale.float())
            sums = self._at(matrices.row_sums(weight.q.contiguous()))
        elif isinstance(weight, GroupedTensor):
            scales = self._at(weight.scale.float())
            book = weight.book.values
            levels = self._at(torch.tensor((*book, *[0.0] * (16 - len(book)))))
        n, k = weight.shape if isinstance(weight, GroupedTensor) else values.shape
        held_bias = None if bias is None else self._at(bias.tensor())
        self.structure = matrices.Matrix(
            kind, _INPUTS[inputs], n, k, self._at(values), scales, sums, held_bias, levels,
            SMALLEST_SCALE if inputs == "dynamic" else input_scale,
        )  # fmt: skip
        self.takes_many = matrices.takes_many(self.structure)
        self.scores_many = self.takes_many and n * k * _PACKED_BYTES[kind] <= _MOST_PACKED
        self.is_small = n * k <= _SMALL
        faster = self.is_small if kind == matrices.INT8 else n >= _LEAST_FLOATS[0] and k >= _LEAST_FLOATS[1]
        self.suits_many = self.takes_many and faster

    def product(self, x: Tensor) -> Tensor:
        """`x [m, k]`, float32, times the weight transposed, plus the bias: `[m, n]`; more than a few rows only
        where `takes_many`, and best where `suits_many`."""
        if x.shape[0] <= FEW_ROWS:
            return matrices.multiply(self.structure, _rows(x))
        assert self.takes_many
        return matrices.multiply_many(self.structure, _rows(x))

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of `targets [m]` where the products of `x [m, k]` are logits: float64 `[m]`.

        Only where `takes_many`, of a weight without bias; best where `scores_many`.
        """
        return matrices.nll_many(self.structure, _rows(x), targets)

    def divergence(self, x: Tensor, targets: Tensor, reference: Matrix, expected: Tensor) -> tuple[Tensor, Tensor]:
        """`nll`, and KL(reference ‖ this) of the logits of `x [m, k]` here, of `expected [m, k]` there: float64 `[m]`.

        Only where both `takes_many`, of weights without bias.
        """
        return matrices.divergence_many(self.structure, _rows(x), targets, reference.structure, _rows(expected))

    def unpacked(self) -> Tensor:
        """The weight as float32 `[n, k]`, the very numbers of `Stored.tensor`."""
        return matrices.unpack(self.structure)

    def _at(self, values: Tensor) -> int:
        """Where these values lie, kept alive."""
        self._held.append(values.detach().contiguous())
        return self._held[-1].data_ptr()


def _rows(x: Tensor) -> Tensor:
    """The same matrix with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _values(weight: Stored) -> tuple[Tensor, int]:
    """The stored numbers of a matrix, and which kind the kernels know them as."""
    match weight:
        case FloatTensor() if weight.value.dtype in _FLOATS:
            return weight.value.data, _FLOATS[weight.value.dtype]
        case Int8Tensor():
            return weight.q, matrices.INT8
        case GroupedTensor():
            return weight.q, matrices.CODES4 if weight.book.bits == 4 else matrices.CODES3
    raise AssertionError(f"{type(weight).__name__} is no matrix that the kernels know")
