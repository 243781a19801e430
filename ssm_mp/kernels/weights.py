"""Weights → codes and float16 scales, by the kernels of `weights.c`; `ssm_mp.precisions.quantize` and `groups` say what
they compute. Tensors are on the CPU, each in one piece, results filled in place.

Dimensions: `r` rows, `n` values in a row, `g` groups of 64 values, `s` clippings of a range, `c` levels of a book.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library

_WORTH_THREADS = 1 << 15
"""Values from which on several threads share a call."""


class Book(ctypes.Structure):
    """`Book` of weights.c. It holds addresses only: whoever makes one keeps the tensors behind it alive."""

    _fields_ = (
        *((name, c_int64) for name in ("bits", "count", "integers")),
        *((name, c_void_p) for name in ("levels", "between")),
        ("limit", c_float),
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.quantize_weight_rows.argtypes = (*[c_int64] * 2, c_void_p, c_int64, *[c_void_p] * 3, c_int)
    found.quantize_weight_groups.argtypes = (
        c_int64, c_void_p, c_int64, c_void_p, POINTER(Book), *[c_void_p] * 2, c_int
    )  # fmt: skip
    for function in (found.quantize_weight_rows, found.quantize_weight_groups):
        function.restype = None
    return found


def quantize_rows(rows: Tensor, factors: Tensor, q: Tensor, scales: Tensor) -> None:
    """`rows [r, n]`, float32, as int8 `q [r, n]` with the best float16 `scales [r]` among `factors [s]` · range.

    Where float16 overflows a scale is infinite, and its row of `q` left as it is.
    """
    r, n = rows.shape
    _require(rows, torch.float32)
    _require(q, torch.int8, r, n)
    _require(scales, torch.float16, r)
    _kernels().quantize_weight_rows(
        r, n, rows.data_ptr(), factors.numel(), factors.data_ptr(), q.data_ptr(), scales.data_ptr(),
        _threads(rows),
    )  # fmt: skip


def quantize_groups(
    groups: Tensor, factors: Tensor, levels: Tensor, bits: int, integers: bool, packed: Tensor, scales: Tensor
) -> None:
    """`groups [g, 64]`, float32, as codes of the book of `levels [c]`, `packed [g, 8·bits]`, and `scales [g]` likewise.

    integers: the levels are all integers between two opposite ones.
    """
    g = groups.shape[0]
    _require(groups, torch.float32, g, 64)
    _require(packed, torch.uint8, g, 8 * bits)
    _require(scales, torch.float16, g)
    between = (levels[1:] + levels[:-1]) / 2
    limit = float(levels.abs().max())
    book = Book(bits, levels.numel(), integers, levels.data_ptr(), between.data_ptr(), limit)
    _kernels().quantize_weight_groups(
        g, groups.data_ptr(), factors.numel(), factors.data_ptr(), byref(book), packed.data_ptr(), scales.data_ptr(),
        _threads(groups),
    )  # fmt: skip


def _threads(values: Tensor) -> int:
    """As many as torch has, but one where there is so little to do that waiting for the others would take longer."""
    return torch.get_num_threads() if values.numel() >= _WORTH_THREADS else 1


def _require(tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError where a tensor is not what C would take it for."""
    fits = tensor.dtype == dtype and tensor.is_contiguous() and (not shape or tuple(tensor.shape) == shape)
    if not fits:
        raise ValueError(f"{tuple(tensor.shape)}, {tensor.dtype}: expected {shape or 'any'}, {dtype}, in one piece")
