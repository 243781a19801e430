"""A stored weight as the kernels read it: products of few rows, for which it is unpacked on the way and never whole,
and products of many rows where the CPU has instructions for them.

Dimensions: `m` rows, `k` inputs and `n` outputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from ssm_mp.kernels import matrices
from ssm_mp.precisions.grouped import GroupedTensor
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.stored import FloatTensor, Stored

FEW_ROWS = 8
"""Up to so many rows wait for the weight to be read; with more, unpacking it once for all pays."""

Inputs = Literal["none", "static", "dynamic"]
_INPUTS = {"none": matrices.AS_THEY_ARE, "static": matrices.STATIC, "dynamic": matrices.DYNAMIC}
_FLOATS = {torch.float32: matrices.FLOAT32, torch.float16: matrices.FLOAT16}
_CODES = {4: matrices.CODES4, 3: matrices.CODES3, 2: matrices.CODES2}
_LEAST_GROUP = 16
"""Codes that are unpacked at a time, with one scale."""

SMALLEST_SCALE = 1e-12
"""Keeps the dynamic scale of an all-zero input away from zero."""
_SMALL = 1 << 18
"""Values of a matrix up to which an integer product here is faster than oneDNN's, measured with AMX."""
_LEAST_FLOATS = (256, 64)
"""Outputs and inputs from which on splitting the inputs of a product of floats pays, measured with AMX."""
_MOST_PACKED = 3 << 26
"""Bytes up to which a head may be laid out whole; of a larger one some outputs at a time are, for every share of the
windows."""


@dataclass(frozen=True, eq=False)
class _Known:
    """A weight `[n, k]` in a form that the kernels know: their word for it and what it is made of.

    scale: float16 `[n]` or one a group; levels: float32 `[16]`, of a code book; group_bits: groups are of
    2^group_bits values; sums: int32 `[n]`, of rows of integers.
    """

    kind: int
    n: int
    k: int
    values: Tensor
    scale: Tensor | None = None
    levels: Tensor | None = None
    group_bits: int = 0
    sums: Tensor | None = None


class Matrix:
    """A weight `[n, k]` with its bias; `structure` is what the kernels take, valid for as long as this lives."""

    def __init__(
        self, known: _Known, bias: Stored | None = None, inputs: Inputs = "none", input_scale: float = 0.0
    ) -> None:
        """Made by `Matrix.of`."""
        self._held: list[Tensor] = []
        n, k, kind = known.n, known.k, known.kind
        scale = None if known.scale is None else known.scale.float()
        self.structure = matrices.Matrix(
            kind, _INPUTS[inputs], n, k, known.group_bits, self._at(known.values), self._optional(scale),
            self._optional(known.sums), self._optional(None if bias is None else bias.tensor()),
            self._optional(known.levels), SMALLEST_SCALE if inputs == "dynamic" else input_scale,
        )  # fmt: skip
        self.takes_many = matrices.takes_many(self.structure)
        self.is_small: bool = n * k <= _SMALL
        self.suits_many = self.takes_many and self._is_fast()
        # within a program inputs are still near, so that small products are worth it, too
        self.suits_program = self.suits_many or (self.takes_many and self.is_small and known.kind != matrices.FLOAT32)

    def _is_fast(self) -> bool:
        """Whether a product of many inputs here is faster than torch's, its unpacking of the weight included."""
        n, k = self.structure.n, self.structure.k
        if self.structure.kind == matrices.FLOAT32:
            return False  # as fast
        if self._multiplies_integers:
            return self.is_small or not matrices.has_vnni()
        large: bool = n >= _LEAST_FLOATS[0] and k >= _LEAST_FLOATS[1]
        return large or not matrices.multiplies_by_amx()

    @classmethod
    def of(
        cls, weight: Stored, bias: Stored | None = None, inputs: Inputs = "none", input_scale: float = 0.0
    ) -> Matrix | None:
        """A weight as the kernels read it, nothing copied but vectors; None where they do not know how it is stored.

        inputs: how those of an int8 weight are quantised; input_scale: that of static ones.
        """
        known = _known(weight)
        return None if known is None else cls(known, bias, inputs, input_scale)

    def product(self, x: Tensor) -> Tensor:
        """`x [m, k]`, float32, times the weight transposed, plus the bias: `[m, n]`; more than a few rows only
        where `takes_many`, and best where `suits_many`."""
        if x.shape[0] <= FEW_ROWS:
            return matrices.multiply(self.structure, _rows(x))
        assert self.takes_many
        return matrices.multiply_many(self.structure, _rows(x))

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index [m]`, int64, as float32 `[m, k]`, the very numbers of `Stored.rows`."""
        return matrices.look_up(self.structure, index)

    def unpacked(self) -> Tensor:
        """The weight as float32 `[n, k]`, the very numbers of `Stored.tensor`."""
        return matrices.unpack(self.structure)

    @property
    def _multiplies_integers(self) -> bool:
        structure = self.structure
        return bool(structure.kind == matrices.INT8 and structure.inputs != matrices.AS_THEY_ARE)

    def laid_out(self) -> Tensor | None:
        """The whole weight as products of many rows read it; None where those lay it out on the way just as well."""
        slow = matrices.has_vnni() if self._multiplies_integers else matrices.multiplies_by_amx()
        return matrices.packed(self.structure) if slow and self.packed_bytes <= _MOST_PACKED else None

    @property
    def packed_bytes(self) -> int:
        """What it takes laid out whole."""
        return matrices.packed_bytes(self.structure)

    def _at(self, values: Tensor) -> int:
        """Where these values lie, kept alive."""
        self._held.append(values.detach().contiguous())
        return self._held[-1].data_ptr()

    def _optional(self, values: Tensor | None) -> int | None:
        """The same of values that may be missing."""
        return None if values is None else self._at(values)


class Head:
    """A weight without bias whose products are logits, never held; laid out once, by the first thread that asks."""

    def __init__(self, matrix: Matrix) -> None:
        """Only of one that `takes_many`."""
        self.matrix = matrix
        self._lock = Lock()
        self._laid: tuple[Tensor | None] | None = None

    def _held(self) -> matrices.Head:
        with self._lock:
            if self._laid is None:
                self._laid = (self.matrix.laid_out(),)
            return self.matrix.structure, self._laid[0]

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of `targets [m]` where the products of `x [m, k]` are logits: float64 `[m]`."""
        return matrices.nll_many(self._held(), _rows(x), targets)

    def divergence(self, x: Tensor, targets: Tensor, reference: Head, expected: Tensor) -> tuple[Tensor, Tensor]:
        """`nll`, the very same numbers, and KL(reference ‖ this) of each token's logits: float64 `[m]` each.

        Logits are those of `x [m, k]` here and of `expected [m, k]` there.
        """
        return matrices.divergence_many(self._held(), _rows(x), targets, reference._held(), _rows(expected))


def head_bytes(n: int, k: int) -> int:
    """Upper bound of what a head `[n, k]` takes beside its weight, once for all threads: laid out whole, in up to three
    pieces of 16 bits a value, or unpacked in float32 where no kernel knows it or it is in blocks.
    """
    return max(4 * n * k, min(6 * n * k, _MOST_PACKED))


def _rows(x: Tensor) -> Tensor:
    """The same matrix with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _known(weight: Stored) -> _Known | None:
    """A weight in the kernels' words; None where they have none for it: its products are then torch's."""
    if type(weight) is FloatTensor and weight.value.dtype in _FLOATS:
        n, k = weight.value.shape
        return _Known(_FLOATS[weight.value.dtype], n, k, weight.value.data)
    if type(weight) is Int8Tensor:
        n, k = weight.q.shape
        sums = matrices.row_sums(weight.q.contiguous())
        return _Known(matrices.INT8, n, k, weight.q, weight.scale, sums=sums)
    if type(weight) is GroupedTensor and weight.book.bits in _CODES and _is_power(weight.group):
        n, k = weight.shape
        book = weight.book.values
        levels = torch.tensor((*book, *[0.0] * (16 - len(book))))
        return _Known(
            _CODES[weight.book.bits], n, k, weight.q, weight.scale, levels, group_bits=weight.group.bit_length() - 1
        )
    return None  # a class derived from these may mean its arrays otherwise


def _is_power(group: int) -> bool:
    """Whether groups are of a power of two values, at least as many as are unpacked at a time."""
    return group >= _LEAST_GROUP and group & (group - 1) == 0
