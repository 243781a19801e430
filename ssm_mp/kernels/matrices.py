"""The structure of `matrix.h`, and the products that take it, of few inputs and of many.

A structure holds addresses only: whoever makes one keeps the tensors behind it alive. Inputs are float32 `[m, k]`, each
row in one piece.

Dimensions: `m` inputs, `k` inner and `n` outputs of a product.
"""

from __future__ import annotations

import ctypes
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
    found.look_up.argtypes = (POINTER(Matrix), c_int64, c_void_p, c_void_p)
    found.look_up.restype = c_int64
    found.unpack.argtypes = (POINTER(Matrix), c_void_p, c_int)
    found.takes_many.argtypes, found.takes_many.restype = (POINTER(Matrix),), c_int
    found.inputs_bytes.argtypes, found.inputs_bytes.restype = (POINTER(Matrix), c_int), c_int64
    found.packed_bytes.argtypes, found.packed_bytes.restype = (POINTER(Matrix),), c_int64
    found.pack_many.argtypes = (POINTER(Matrix), c_void_p, c_int)
    found.multiply_many.argtypes = (POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int)
    found.scored_scratch_bytes.argtypes = (POINTER(Matrix), POINTER(Matrix), c_int64, c_int)
    found.scored_scratch_bytes.restype = c_int64
    head = (POINTER(Matrix), c_void_p)
    found.nll_many.argtypes = (*head, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int)
    found.divergence_many.argtypes = (*head, *head, c_int64, *(c_void_p, c_int64) * 2, *[c_void_p] * 4, c_int)
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
    """Whether floats are multiplied by AMX, whose rounding is another than torch's."""
    return bool(_kernels().multiplies_by_amx())


def has_vnni() -> bool:
    """Whether oneDNN finds AVX-512's instructions for integers on this CPU, and perhaps AMX's."""
    return bool(_kernels().has_vnni())


def multiply_many(matrix: Matrix, inputs: Tensor) -> Tensor:
    """`multiply` for many inputs."""
    _require(matrix, inputs)
    m, threads = inputs.shape[0], torch.get_num_threads()
    found, scratch = torch.empty(m, matrix.n), _bytes(_kernels().inputs_bytes(byref(matrix), threads))
    _kernels().multiply_many(
        byref(matrix), m, inputs.data_ptr(), inputs.stride(0), found.data_ptr(), scratch.data_ptr(), threads
    )
    return found


def packed_bytes(matrix: Matrix) -> int:
    """What a whole matrix takes laid out."""
    return int(_kernels().packed_bytes(byref(matrix)))


def packed(matrix: Matrix) -> Tensor:
    """A whole matrix laid out for `nll_many` and `divergence_many`."""
    found = _bytes(packed_bytes(matrix))
    _kernels().pack_many(byref(matrix), found.data_ptr(), torch.get_num_threads())
    return found


Head = tuple[Matrix, Tensor | None]
"""A matrix, and the same laid out whole; None: it is laid out on the way, some outputs at a time."""


def nll_many(head: Head, inputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of `targets [m]`, int64, where those products are logits, never held: float64 `[m]`."""
    matrix, laid = head
    _require(matrix, inputs, targets)
    m, threads, targets = inputs.shape[0], torch.get_num_threads(), targets.contiguous()
    scratch = _bytes(_kernels().scored_scratch_bytes(byref(matrix), None, m, threads))
    nll = torch.empty(m, dtype=torch.float64)
    _kernels().nll_many(
        byref(matrix), _at(laid), m, inputs.data_ptr(), inputs.stride(0), targets.data_ptr(), nll.data_ptr(),
        scratch.data_ptr(), threads,
    )  # fmt: skip
    return nll


def divergence_many(
    head: Head, inputs: Tensor, targets: Tensor, expected: Head, theirs: Tensor
) -> tuple[Tensor, Tensor]:
    """`nll_many`, and KL of these logits from those that `expected` makes of `theirs [m, k]`: float64 `[m]` each."""
    (matrix, laid), (other, other_laid) = head, expected
    _require(matrix, inputs, targets)
    _require(other, theirs, targets)
    if matrix.n != other.n:
        raise ValueError(f"{matrix.n} outputs beside {other.n}: as many are wanted")
    m, threads, targets = inputs.shape[0], torch.get_num_threads(), targets.contiguous()
    scratch = _bytes(_kernels().scored_scratch_bytes(byref(matrix), byref(other), m, threads))
    nll, kl = torch.empty(m, dtype=torch.float64), torch.empty(m, dtype=torch.float64)
    _kernels().divergence_many(
        byref(matrix), _at(laid), byref(other), _at(other_laid), m, inputs.data_ptr(), inputs.stride(0),
        theirs.data_ptr(), theirs.stride(0), targets.data_ptr(), nll.data_ptr(), kl.data_ptr(), scratch.data_ptr(),
        threads,
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


def _bytes(count: int) -> Tensor:
    """Memory that functions work in."""
    return torch.empty(count, dtype=torch.int8)


def _at(held: Tensor | None) -> int | None:
    return None if held is None else held.data_ptr()


def row_sums(values: Tensor) -> Tensor:
    """Sums of the rows of int8 `values [n, k]`, contiguous: int32 `[n]`. Torch would hold all values as int32."""
    n, k = values.shape
    sums = torch.empty(n, dtype=torch.int32)
    _kernels().row_sums(n, k, values.data_ptr(), sums.data_ptr())
    return sums


def look_up(matrix: Matrix, index: Tensor) -> Tensor:
    """The rows `index [m]`, int64, as float32 `[m, k]`. Raises IndexError for a row that is not there."""
    index = index.contiguous()
    found = torch.empty(index.numel(), matrix.k)
    wrong = _kernels().look_up(byref(matrix), index.numel(), index.data_ptr(), found.data_ptr())
    if wrong >= 0:
        raise IndexError(f"row {int(index[wrong])} of {matrix.n}")
    return found


def unpack(matrix: Matrix) -> Tensor:
    """A whole matrix as float32 `[n, k]`."""
    found = torch.empty(matrix.n, matrix.k)
    _kernels().unpack(byref(matrix), found.data_ptr(), torch.get_num_threads())
    return found
