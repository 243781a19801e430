"""Symmetric quantisation as pure functions: scales, rounding, and the integer product.

Dimensions: `r` rows (one scale each), `n` values in a row, `m` tokens, `k` inner size of a product.

A scale is chosen in float32, rounded up to float16 (so the largest value is never clipped by the
rounding of its scale), and only then used: the stored scale is the one that quantised the values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.scheme import ScaleRule

FLOAT16_LARGEST = 65504.0
FLOAT16_SMALLEST = 2.0**-24

INT8_LIMIT = 127
"""Largest magnitude of a symmetric int8 value; −128 is not used."""

CLIPPINGS = 51
"""Clippings of a row's range that the least-square rule tries."""

_EXACT_FLOAT32_TERMS = (1 << 24) // (INT8_LIMIT * INT8_LIMIT)
"""How many int8 × int8 products float32 adds up without rounding (integers below 2^24 are exact)."""

_FEWEST_ROWS, _PADDED_ROWS, _MULTIPLE = 17, 32, 8
"""What torch's int8 product asks of its sizes on CUDA: so many rows, and the other sizes multiples of this."""


def weight_scales(rows: Tensor, rule: ScaleRule, limit: int = INT8_LIMIT) -> Tensor:
    """Scales of `rows [r, n]` (float32), one a row: float16 `[r]`, as they are stored.

    Raises InfeasibleError where float16 cannot hold a scale. A row of zeros has scale 1.
    """
    full = row_ranges(rows, rule) / limit
    return best_row_scales(rows, full, limit) if rule.method == "mse" else stored_scales(full)


def row_ranges(rows: Tensor, rule: ScaleRule) -> Tensor:
    """Up to which magnitude each of `rows [r, n]` (float32) is held, float32 `[r]`; with `mse`, before any clipping."""
    magnitudes = rows.abs()
    if rule.method != "percentile":
        return magnitudes.amax(dim=1)
    rank = max(1, min(rows.shape[1], -int(-rule.percentile * rows.shape[1] // 100)))
    largest = magnitudes.kthvalue(rank, dim=1).values
    # a row whose percentile is zero still has values to hold
    return torch.where(largest > 0, largest, magnitudes.amax(dim=1))


def best_row_scales(rows: Tensor, full: Tensor, limit: int = INT8_LIMIT) -> Tensor:
    """The stored scales `[r]` of least square error; `full [r]`: those that clip nothing."""
    return least_square_scales(full, lambda scales: _square_error(rows, scales, limit), clippings(CLIPPINGS))


def least_square_scales(full: Tensor, error: Callable[[Tensor], Tensor], parts: Sequence[float]) -> Tensor:
    """The stored scales `[r]` of least error among parts of `full [r]`, the first among equals.

    error: of stored scales `[r]`, one number a row `[r]`. Parts beyond float16 are its largest value; the first is not.
    """
    best = stored_scales(full * parts[0])
    best_error = error(best)
    for part in parts[1:]:
        scales = stored_scales((full * part).clamp_(-FLOAT16_LARGEST, FLOAT16_LARGEST))
        found = error(scales)
        better = found < best_error
        best = torch.where(better, scales, best)
        best_error = torch.where(better, found, best_error)
    return best


def clippings(steps: int, widest: float = 1.0) -> tuple[float, ...]:
    """Parts of a range, the whole first, then `steps` from the widest down to half of the whole; where the whole is the
    widest it is one of them."""
    return (1.0, *(widest - (widest - 0.5) * i / (steps - 1) for i in range(0 if widest > 1 else 1, steps)))


def _square_error(rows: Tensor, scales: Tensor, limit: int) -> Tensor:
    """Squared quantisation error of each row: float32 `[r]`."""
    return (dequantize_rows(quantize_rows(rows, scales, limit), scales) - rows).square().sum(dim=1)


def stored_scales(scales: Tensor) -> Tensor:
    """float32 scales as float16, magnitudes rounded up; zeros become 1 (nothing to scale).

    What is too small for float16 has its smallest scale: values below half of that are then stored as zeros, which is
    the nearest that there is. Raises InfeasibleError where float16 overflows.
    """
    half = scales.half()
    # the bits of float16 numbers of one sign, as integers, are in the order of their magnitudes
    up = (half.view(torch.int16) + 1).view(torch.float16)
    half = torch.where(half.float().abs() < scales.abs(), up, half)
    if bool(torch.isinf(half).any()):
        raise InfeasibleError(_overflow(scales.abs().max().item()))
    return torch.where(scales != 0, half, torch.ones_like(half))


def scale_refusal(largest: float, limit: float) -> str | None:
    """Why float16 holds no scale with which `limit` reaches a magnitude; None where it holds one."""
    scale = torch.tensor(largest) / limit
    return _overflow(scale.item()) if scale > FLOAT16_LARGEST else None


def _overflow(scale: float) -> str:
    return f"a scale of {scale:.3g} is above float16's largest value, {FLOAT16_LARGEST:.0f}"


def quantize_rows(rows: Tensor, scales: Tensor, limit: int = INT8_LIMIT) -> Tensor:
    """`clamp(round(rows / scale), −limit, limit)` of `rows [r, n]`: int8 `[r, n]`."""
    return (rows / scales.float()[:, None]).round_().clamp_(-limit, limit).to(torch.int8)


def dequantize_rows(quantized: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `quantize_rows` up to rounding: float32 `[r, n]`."""
    return quantized.float() * scales.float()[:, None]


def histogram_scale(counts: Tensor, largest: float, rule: ScaleRule, limit: int = INT8_LIMIT) -> Tensor:
    """Scale of activations from a histogram of their magnitudes over `[0, largest]`: float16 `[1]`.

    counts: float64 `[bins]`, equal bins. Raises InfeasibleError where the scale overflows float16.
    """
    bins = counts.shape[0]
    edges = torch.arange(1, bins + 1, dtype=torch.float64) * (largest / bins)
    if rule.method == "minmax" or largest == 0:
        clip = torch.tensor(largest, dtype=torch.float64)
    elif rule.method == "percentile":
        reached = counts.cumsum(0) >= counts.sum() * (rule.percentile / 100)
        clip = edges[int(reached.nonzero()[0])]
    else:
        centres = edges - 0.5 * largest / bins
        clips = largest * torch.linspace(0.05, 1.0, 191, dtype=torch.float64)
        scales = clips[:, None] / limit
        restored = (centres / scales).round().clamp(max=limit) * scales  # [clips, bins]
        clip = clips[int(((restored - centres).square() @ counts).argmin())]
    return stored_scales((clip / limit).float().reshape(1))


def powers_of_two(exponent: Tensor) -> Tensor:
    """Two to the power of small integers `[n]`: float32 `[n]`, exact, as float32 is made of its bits."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def quantize_tensor(values: Tensor, scale: Tensor) -> Tensor:
    """Activations of any shape with one float32 scale (a scalar, or one a token `[…, 1]`): int8."""
    return (values / scale).round_().clamp_(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [m, k] @ b [n, k]ᵀ` of int8 matrices, accumulated in int32: `[m, n]`.

    On a GPU `b` may have been padded with zeros beforehand, by `padded_weight`: `[m, padded n]`.
    """
    if a.is_cuda:
        return padded_product(a, b, _native_product)
    # torch 2.13's product of one-column matrices leaves its result uninitialised on a CPU
    if a.shape[1] == 1 or not _native_product_serves():
        return integer_product_emulated(a, b)
    return _native_product(a, b)


def _native_product(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch._int_mm(a, b.t())
    return product


def padded_product(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`product(a [m, k], b [n, k])` of one that, as torch's on CUDA, takes only 17 rows or more and weights that fit.

    Zeros are appended to both, and what they give is cut off: int32 `[m, n]`. Where `b` is padded already, `a` has
    fewer columns.
    """
    m, n = a.shape[0], b.shape[0]
    if not fits_product(b.shape):
        b = padded_weight(b)
    padded = product(_with_zeros(a, m if m >= _FEWEST_ROWS else _PADDED_ROWS, b.shape[1]), b)  # [padded m, padded n]
    return padded if padded.shape == (m, n) else padded[:m, :n]


def fits_product(shape: Sequence[int]) -> bool:
    """Whether torch's int8 product on CUDA takes a weight of this shape as it is."""
    return all(size % _MULTIPLE == 0 for size in shape)


def padded_weight(b: Tensor) -> Tensor:
    """`b [n, k]` with zeros below and to the right, so that it fits."""
    return _with_zeros(b, *(-(-size // _MULTIPLE) * _MULTIPLE for size in b.shape))


def _with_zeros(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with zeros below and to the right, `[rows, columns]`; the same tensor where it has these sizes."""
    below, right = rows - matrix.shape[0], columns - matrix.shape[1]
    return F.pad(matrix, (0, right, 0, below)) if below or right else matrix


@cache
def _native_product_is_exact() -> bool:
    """Whether this CPU's int8 product is that of the integers: without VNNI, oneDNN's saturates in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.full((32, 256), INT8_LIMIT, dtype=torch.int8)
    mixed = torch.randint(-INT8_LIMIT, INT8_LIMIT + 1, (32, 256), generator=generator, dtype=torch.int8)
    pairs = ((extremes, extremes), (extremes, -extremes), (mixed, mixed), (mixed, extremes))
    return all(torch.equal(torch._int_mm(a, b.t()), integer_product_emulated(a, b)) for a, b in pairs)


@cache
def _native_product_serves() -> bool:
    """Whether this CPU's int8 product is exact and the faster one; the numbers are the same either way.

    Without VNNI oneDNN may be exact and fifteen times slower than the emulation (`python -m benchmarks.integers`).
    """
    if not _native_product_is_exact():
        return False
    a = torch.ones(256, 256, dtype=torch.int8)
    return _seconds(_native_product, a) <= _seconds(integer_product_emulated, a)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor) -> float:
    """The least time of a few products of a matrix with itself, transposed."""
    product(a, a)  # the first one sets up
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        product(a, a)
        spent.append(time.perf_counter() - began)
    return min(spent)


def integer_product_emulated(a: Tensor, b: Tensor) -> Tensor:
    """The same product, exact on any device: float32 products of blocks short enough not to round."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_FLOAT32_TERMS):
        block = slice(start, start + _EXACT_FLOAT32_TERMS)
        total += (a[:, block].float() @ b[:, block].float().t()).to(torch.int32)
    return total
