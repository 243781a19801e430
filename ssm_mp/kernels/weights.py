"""Weights → codes and float16 scales, by the kernels of `weights.c`; `ssm_mp.precisions.quantize` and `groups` say what
they compute. Tensors are on the CPU, each in one piece, results filled in place.

Dimensions: `r` rows, `n` values in a row, `g` groups of `k` values (32, 64 or 128), `s` parts of a range, `c` levels of
a book.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library

GROUPS = (32, 64, 128)
"""Sizes of groups that the kernel knows."""
_WORTH_THREADS = 1 << 15
"""Values from which on several threads share a call."""


class Book(ctypes.Structure):
    """`Book` of weights.c. It holds addresses only: whoever makes one keeps the tensors behind it alive."""

    _fields_ = (
        *((name, c_int64) for name in ("bits", "count", "integers")),
        *((name, c_void_p) for name in ("levels", "between", "codes")),
        *((name, c_float) for name in ("limit", "reach")),
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.quantize_weight_rows.argtypes = (*[c_int64] * 2, c_void_p, c_int64, *[c_void_p] * 3, c_int)
    found.quantize_weight_groups.argtypes = (
        *[c_int64] * 2, c_void_p, c_int64, c_void_p, POINTER(Book), *[c_void_p] * 2, c_int
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
    """`groups [g, k]`, float32, as codes of a book, `packed [g, k·bits/8]`, and `scales [g]` likewise; negative factors
    are scales of the other sign.

    levels: the value of each code `[c]`. integers: they are all integers between two, and codes count up from the first
    of them, modulo 2^bits.
    """
    g, k = groups.shape
    if k not in GROUPS:
        raise ValueError(f"groups of {k} values: the kernel knows groups of {', '.join(map(str, GROUPS))}")
    _require(groups, torch.float32, g, k)
    _require(packed, torch.uint8, g, k * bits // 8)
    _require(scales, torch.float16, g)
    rising, order = levels.sort()
    between, codes = (rising[1:] + rising[:-1]) / 2, order.to(torch.uint8)
    least, most = float(rising[0]), float(rising[-1])
    reach = 0.0 if least == -most else least if -least > most else most
    book = Book(
        bits,
        levels.numel(),
        integers,
        rising.data_ptr(),
        between.data_ptr(),
        codes.data_ptr(),
        max(-least, most),
        reach,
    )
    _kernels().quantize_weight_groups(
        g, k, groups.data_ptr(), factors.numel(), factors.data_ptr(), byref(book), packed.data_ptr(), scales.data_ptr(),
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
