"""Rounding a block of columns, each making up for the others' errors, by the kernels of `compensate.c`;
`ssm_mp.precisions.compensate` says what they compute. Tensors are float32 on the CPU, each in one piece.

Dimensions: `n` rows, `b` columns of a block, `c` levels of a book.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library

MOST = 128
"""Values of a group whose scale `choose_scales` chooses, at most."""


@cache
def _kernels() -> CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.round_columns.argtypes = (*[c_int64] * 2, *[c_void_p] * 3, c_int64, *[c_void_p] * 4, c_int)
    found.descend_columns.argtypes = (*[c_int64] * 2, *[c_void_p] * 4, c_int64, *[c_void_p] * 2, c_int)
    found.choose_scales.argtypes = (*[c_int64] * 2, *[c_void_p] * 2, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int)
    for function in (found.round_columns, found.descend_columns, found.choose_scales):
        function.restype = None
    return found


def round_columns(weight: Tensor, factor: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [n, b]` rounded to the rising `levels [c]` times `scale [n, b]`, and each error over factor's diagonal.

    factor: upper triangular `[b, b]`. weight is used up.
    """
    n, b = weight.shape
    between = (levels[1:] + levels[:-1]) / 2
    rounded, errors = torch.empty_like(weight), torch.empty_like(weight)
    _require(n, b, weight, scale)
    _require(b, b, factor)
    _kernels().round_columns(
        n, b, weight.data_ptr(), factor.data_ptr(), scale.data_ptr(), levels.numel(), levels.data_ptr(),
        between.data_ptr(), rounded.data_ptr(), errors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return rounded, errors


def descend_columns(rounded: Tensor, gradient: Tensor, curvature: Tensor, scale: Tensor, levels: Tensor) -> None:
    """Move each of `rounded [n, b]` to the level times `scale [n, b]` that is best while all others stay.

    gradient `[n, b]`: half that of the square error; curvature `[b, b]`. rounded and gradient are changed in place.
    """
    n, b = rounded.shape
    between = (levels[1:] + levels[:-1]) / 2
    _require(n, b, rounded, gradient, scale)
    _require(b, b, curvature)
    _kernels().descend_columns(
        n, b, rounded.data_ptr(), gradient.data_ptr(), curvature.data_ptr(), scale.data_ptr(), levels.numel(),
        levels.data_ptr(), between.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def choose_scales(groups: Tensor, weight: Tensor, candidates: Tensor, levels: Tensor) -> Tensor:
    """The one of `candidates [s, g]` for each of `groups [g, n]` with the least square error, each value counting by
    `weight [g, n]`, the first among equals: `[g]`. Groups are of `MOST` values at most."""
    g, n = groups.shape
    between, best = (levels[1:] + levels[:-1]) / 2, torch.empty_like(groups[:, 0])
    if n > MOST:
        raise ValueError(f"groups of {n} values: the kernel takes at most {MOST}")
    _require(g, n, groups, weight)
    _require(len(candidates), g, candidates)
    _kernels().choose_scales(
        g, n, groups.data_ptr(), weight.data_ptr(), len(candidates), candidates.data_ptr(), levels.numel(),
        levels.data_ptr(), between.data_ptr(), best.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return best


def _require(rows: int, columns: int, *tensors: Tensor) -> None:
    """Raise ValueError where a tensor is not what C would take it for."""
    for tensor in tensors:
        if tuple(tensor.shape) != (rows, columns) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{tuple(tensor.shape)}, {tensor.dtype}: expected {(rows, columns)}, float32, in one piece"
            )
