"""Precision `int8`: integers of one byte with a scale a row.

Dimensions: `r` rows, `n` values in a row, `m` inputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls, weights
from ssm_mp.precisions.precision import Precision, Unsure
from ssm_mp.precisions.quantize import (
    CLIPPINGS,
    INT8_LIMIT,
    best_row_scales,
    clippings,
    dequantize_rows,
    fits_product,
    integer_product,
    padded_weight,
    quantize_rows,
    row_ranges,
    scale_refusal,
    stored_scales,
)
from ssm_mp.precisions.slices import in_slices, largest_magnitude
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
    def integers(self) -> Tensor:
        return self.q

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
    takes_any_float = True

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        scales = shape[0] if role == "weight" else 1
        return {"q": ArraySpec(shape, torch.int8), "scale": ArraySpec((scales,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        q = torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device)
        by_kernel = rule.method != "percentile" and calls.usable(rows[:0].float())
        scale = (_quantized_by_kernel if by_kernel else _quantized)(rows, rule, q.view(rows.shape))
        return Int8Tensor(q, scale)

    def _refusal(self, largest: float, rule: ScaleRule) -> str | Unsure | None:
        refused = scale_refusal(largest, INT8_LIMIT)
        # a percentile may leave the largest out
        return refused if refused is None or rule.method != "percentile" else Unsure.UNSURE

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return Int8Tensor(arrays["q"], arrays["scale"])


def _quantized(rows: Tensor, rule: ScaleRule, q: Tensor) -> Tensor:
    """Fill `q [r, n]` with `rows [r, n]` of any float type, slice by slice; their scales, float16 `[r]`.

    What `weight_scales` and `quantize_rows` give for the whole.
    """
    full = torch.empty(rows.shape[0], device=rows.device)

    def find_range(part: slice) -> None:
        full[part] = row_ranges(rows[part].float(), rule) / INT8_LIMIT

    in_slices(find_range, rows.shape[0], rows.shape[1], rows.device)
    scale = stored_scales(full)

    def fill(part: slice) -> None:
        values = rows[part].float()
        if rule.method == "mse":
            scale[part] = best_row_scales(values, full[part])
        q[part] = quantize_rows(values, scale[part])

    in_slices(fill, rows.shape[0], rows.shape[1], rows.device)
    return scale


def _quantized_by_kernel(rows: Tensor, rule: ScaleRule, q: Tensor) -> Tensor:
    """The same by a kernel; least-square scales of as little error, which may be others."""
    scale = torch.empty(rows.shape[0], dtype=torch.float16)
    factors = torch.tensor(clippings(CLIPPINGS) if rule.method == "mse" else (1.0,))

    def fill(part: slice) -> None:
        weights.quantize_rows(rows[part].float().contiguous(), factors, q[part], scale[part])

    in_slices(fill, rows.shape[0], rows.shape[1], rows.device)
    if bool(scale.isinf().any()):
        raise InfeasibleError(scale_refusal(largest_magnitude(rows), INT8_LIMIT))
    return scale


INT8 = Int8()
