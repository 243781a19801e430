"""The structure of `matrix.h`, and the products that take it, of few inputs and of many.

A structure holds addresses only: whoever makes one keeps the tensors behind it alive. Inputs are float32 `[m, k]`, each
row in one piece.

Dimensions: `m` inputs, `k` inner and `n` outputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library

FLOAT32, FLOAT16, INT8, CODES4, CODES3, CODES2 = range(6)
"""How a weight is stored."""
AS_THEY_ARE, STATIC, DYNAMIC = range(3)
"""How its inputs are quantised."""


class Matrix(ctypes.Structure):
    """A weight `[n, k]` as it is stored."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "inputs", "n", "k", "group_bits")),
        *((name, c_void_p) for name in ("values", "scales", "sums", "bias", "levels")),
        ("input_scale", c_float),
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.multiply_once.argtypes = (POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int)
    found.scratch_bytes.argtypes, found.scratch_bytes.restype = (POINTER(Matrix), c_int64), c_int64
    found.row_sums.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
    found.unpack.argtypes = (POINTER(Matrix), c_void_p, c_int)
    found.takes_many.argtypes, found.takes_many.restype = (POINTER(Matrix),), c_int
    if hasattr(found, "multiply_many"):  # else this CPU lacks the instructions
        for scratch in (found.many_scratch_bytes, found.scored_scratch_bytes):
            scratch.argtypes, scratch.restype = (POINTER(Matrix), c_int), c_int64
        found.multiply_many.argtypes = (POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int)
        found.nll_many.argtypes = (POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int)
        found.divergence_many.argtypes = (
            POINTER(Matrix), POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 4, c_int
        )  # fmt: skip
    return found


def multiply(matrix: Matrix, inputs: Tensor) -> Tensor:
    """`inputs [m, k]` times the matrix transposed, plus bias: `[m, n]`; for few inputs."""
    m = inputs.shape[0]
    scratch = torch.empty(_kernels().scratch_bytes(byref(matrix), m), dtype=torch.int8)
    found = torch.empty(m, matrix.n)
    _kernels().multiply_once(
        byref(matrix), m, inputs.data_ptr(), inputs.stride(0), found.data_ptr(), scratch.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return found


def takes_many(matrix: Matrix) -> bool:
    """Whether `multiply_many` and `nll_many` take this matrix on this CPU."""
    return bool(_kernels().takes_many(byref(matrix)))


def multiplies_by_amx() -> bool:
    """Whether float16 weights are multiplied by AMX, whose rounding is another than torch's."""
    return bool(_kernels().multiplies_by_amx())


def multiply_many(matrix: Matrix, inputs: Tensor) -> Tensor:
    """`multiply` for many inputs."""
    _require(matrix, inputs)
    m = inputs.shape[0]
    found, scratch = torch.empty(m, matrix.n), _scratch(_kernels().many_scratch_bytes, matrix)
    if m > 0:
        _kernels().multiply_many(
            byref(matrix), m, inputs.data_ptr(), inputs.stride(0), found.data_ptr(), scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return found


def nll_many(matrix: Matrix, inputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of `targets [m]`, int64, where those products are logits, never held: float64 `[m]`."""
    _require(matrix, inputs, targets)
    m, targets, scratch = inputs.shape[0], targets.contiguous(), _scratch(_kernels().scored_scratch_bytes, matrix)
    nll = torch.empty(m, dtype=torch.float64)
    if m > 0:
        _kernels().nll_many(
            byref(matrix), m, inputs.data_ptr(), inputs.stride(0), targets.data_ptr(), nll.data_ptr(),
            scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return nll


def divergence_many(
    matrix: Matrix, inputs: Tensor, targets: Tensor, expected: Matrix, theirs: Tensor
) -> tuple[Tensor, Tensor]:
    """`nll_many`, and KL of these logits from those that `expected` makes of `theirs [m, k]`: float64 `[m]` each."""
    _require(matrix, inputs, targets)
    _require(expected, theirs, targets)
    if matrix.n != expected.n:
        raise ValueError(f"{matrix.n} outputs beside {expected.n}: as many are wanted")
    m, targets = inputs.shape[0], targets.contiguous()
    scratch = _scratch(_kernels().scored_scratch_bytes, matrix, expected)
    nll, kl = torch.empty(m, dtype=torch.float64), torch.empty(m, dtype=torch.float64)
    if m > 0:
        _kernels().divergence_many(
            byref(matrix), byref(expected), m, inputs.data_ptr(), inputs.stride(0), theirs.data_ptr(),
            theirs.stride(0), targets.data_ptr(), nll.data_ptr(), kl.data_ptr(), scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return nll, kl


def _require(matrix: Matrix, inputs: Tensor, targets: Tensor | None = None) -> None:
    """Raise ValueError where inputs or targets do not fit the matrix: C would read beyond them."""
    if inputs.dim() != 2 or inputs.shape[1] != matrix.k:
        raise ValueError(f"inputs {tuple(inputs.shape)} for a product of {matrix.k} values each")
    if targets is None:
        return
    if targets.shape != inputs.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets {tuple(targets.shape)}, {targets.dtype}: one int64 for each of {len(inputs)} inputs")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < matrix.n:
        raise ValueError(f"targets from {int(targets.min())} to {int(targets.max())} of {matrix.n} outputs")


def _scratch(needed: Callable[..., int], *heads: Matrix) -> Tensor:
    """Memory in which the functions for many inputs lay out weights and inputs; `needed` tells the bytes for each."""
    threads = torch.get_num_threads()
    return torch.empty(sum(needed(byref(matrix), threads) for matrix in heads), dtype=torch.int8)


def row_sums(values: Tensor) -> Tensor:
    """Sums of the rows of int8 `values [n, k]`, contiguous: int32 `[n]`. Torch would hold all values as int32."""
    n, k = values.shape
    sums = torch.empty(n, dtype=torch.int32)
    _kernels().row_sums(n, k, values.data_ptr(), sums.data_ptr())
    return sums


def unpack(matrix: Matrix) -> Tensor:
    """A whole matrix as float32 `[n, k]`."""
    found = torch.empty(matrix.n, matrix.k)
    _kernels().unpack(byref(matrix), found.data_ptr(), torch.get_num_threads())
    return found
