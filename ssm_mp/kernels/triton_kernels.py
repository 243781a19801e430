"""The passes around a product as Triton kernels, each over memory once. Importing this needs Triton.

Dimensions: `b` batch, `l` length, `I` inner, `K` convolution kernel, `m` rows (tokens), `k` inputs and `n` outputs of a
product, `V` vocabulary. `name_axis` are strides in elements; a program holds `BLOCK_axis` of an axis at a time.
Numbers of rows are not specialised on, or each new length of a text would compile anew.

Under TRITON_INTERPRET=1, set before the import, the same kernels run on a CPU without a driver.
"""

# a kernel takes a flat list of arguments, in the field's names
# ruff: noqa: N803, PLR0913, PLR0917
# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDING = tl.constexpr(12582912.0)
"""1.5 · 2^23: a float32 below 2^22 in magnitude, added to it, rounds to an integer, half to even."""
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    """x·sigmoid(x), without overflow: exp is only taken of what is not positive."""
    e = tl.exp(-tl.abs(x))
    return x * tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _is_finite(x: tl.tensor) -> tl.tensor:
    """False for NaN and both infinities."""
    return tl.abs(x) < _INFINITY


@triton.jit
def _to_int8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """`round(x / scale)` within ±127, half to even; NaN, which has no int8 value, becomes some number."""
    clipped = tl.minimum(tl.maximum(tl.div_rn(x, scale), -127.0), 127.0)
    return ((clipped + _ROUNDING) - _ROUNDING).to(tl.int8)


@triton.jit(do_not_specialize=["rows", "length"])
def conv_silu_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, before: tl.tensor, y: tl.tensor,
    rows: tl.tensor, length: tl.tensor, inner: tl.tensor,
    x_b: tl.tensor, x_l: tl.tensor, x_i: tl.tensor,
    weight_i: tl.tensor, weight_k: tl.tensor,
    before_b: tl.tensor, before_k: tl.tensor, before_i: tl.tensor,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
) -> None:  # fmt: skip
    """Causal depthwise convolution, then SiLU: grid (⌈rows / BLOCK_M⌉, ⌈I / BLOCK_I⌉), rows = b·l.

    x `[b, l, I]`, weight `[I, K]`, bias `[I]`, before `[b, K − 1, I]`; y `[b, l, I]` is contiguous.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_i = i < inner
    inside = (row < rows)[:, None] & in_i[None, :]  # [BLOCK_M, BLOCK_I]
    b, t = (row // length).to(tl.int64), (row % length).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for k in tl.static_range(K):
        source = t + (k - (K - 1))
        old = (source < 0)[:, None]
        x_at = x + (b * x_b + source * x_l)[:, None] + (i * x_i)[None, :]
        before_at = before + (b * before_b + (source + (K - 1)) * before_k)[:, None] + (i * before_i)[None, :]
        new_inputs = tl.load(x_at, mask=inside & (source >= 0)[:, None], other=0.0)
        old_inputs = tl.load(before_at, mask=inside & old, other=0.0)
        tap = tl.load(weight + i * weight_i + k * weight_k, mask=in_i, other=0.0)
        total += tl.where(old, old_inputs, new_inputs) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(bias + i, mask=in_i, other=0.0)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * inner + i[None, :], _silu(total), mask=inside)


@triton.jit(do_not_specialize=["m"])
def quantize_static_kernel(
    x: tl.tensor, scale: tl.tensor, q: tl.tensor, scales: tl.tensor,
    m: tl.tensor, k: tl.tensor, x_m: tl.tensor, x_k: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """x `[m, k]` with the one scale → q `[m, k]` int8; scales `[m]` get it, or NaN: grid (⌈m / BLOCK_M⌉,)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = row < m
    step = tl.load(scale).to(tl.float32)
    spoiled = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = in_m[:, None] & (column < k)[None, :]
        values = tl.load(x + row[:, None] * x_m + (column * x_k)[None, :], mask=inside, other=0.0)
        spoiled = tl.where(_is_finite(values), spoiled, 1)
        tl.store(q + row[:, None] * k + column[None, :], _to_int8(values, step), mask=inside)
    tl.store(scales + row, tl.where(tl.max(spoiled, axis=1) > 0, float("nan"), step), mask=in_m)


@triton.jit(do_not_specialize=["m"])
def quantize_dynamic_kernel(
    x: tl.tensor, smallest: tl.tensor, q: tl.tensor, scales: tl.tensor,
    m: tl.tensor, k: tl.tensor, x_m: tl.tensor, x_k: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """The same with each row's own scale, its largest magnitude / 127, at least `smallest`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = row < m
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    spoiled = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = in_m[:, None] & (column < k)[None, :]
        values = tl.load(x + row[:, None] * x_m + (column * x_k)[None, :], mask=inside, other=0.0)
        finite = _is_finite(values)
        spoiled = tl.where(finite, spoiled, 1)
        largest = tl.maximum(largest, tl.where(finite, tl.abs(values), 0.0))
    step = tl.maximum(tl.div_rn(tl.max(largest, axis=1), 127.0), smallest)  # [BLOCK_M]
    for start in range(0, k, BLOCK_K):  # the row is still in the cache
        column = start + tl.arange(0, BLOCK_K)
        inside = in_m[:, None] & (column < k)[None, :]
        values = tl.load(x + row[:, None] * x_m + (column * x_k)[None, :], mask=inside, other=0.0)
        steps = tl.broadcast_to(step[:, None], (BLOCK_M, BLOCK_K))
        tl.store(q + row[:, None] * k + column[None, :], _to_int8(values, steps), mask=inside)
    tl.store(scales + row, tl.where(tl.max(spoiled, axis=1) > 0, float("nan"), step), mask=in_m)


@triton.jit(do_not_specialize=["m"])
def rescale_kernel(
    sums: tl.tensor, columns: tl.tensor, rows: tl.tensor, bias: tl.tensor, product: tl.tensor,
    m: tl.tensor, n: tl.tensor, sums_m: tl.tensor,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """int32 sums `[m, n]` · columns `[n]` · rows `[m]` + bias `[n]`: grid (⌈m / BLOCK_M⌉, ⌈n / BLOCK_N⌉).

    product `[m, n]`, float32, has the strides of `sums` and may be the same memory.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = row < m, column < n
    inside = in_m[:, None] & in_n[None, :]
    at = row[:, None] * sums_m + column[None, :]
    value = tl.load(sums + at, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(columns + column, mask=in_n, other=0.0)[None, :]
    value = value * tl.load(rows + row, mask=in_m, other=0.0)[:, None]
    if HAS_BIAS:
        value = value + tl.load(bias + column, mask=in_n, other=0.0)[None, :]
    tl.store(product + at, value, mask=inside)


@triton.jit(do_not_specialize=["m"])
def scaled_product_kernel(
    a: tl.tensor, b: tl.tensor, columns: tl.tensor, rows: tl.tensor, bias: tl.tensor, product: tl.tensor,
    m: tl.tensor, n: tl.tensor, k: tl.tensor, a_m: tl.tensor, b_n: tl.tensor,
    HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """a `[m, k]` · b `[n, k]`ᵀ, int8, added up in int32, then as `rescale_kernel`: product `[m, n]`, contiguous.

    Grid (⌈m / BLOCK_M⌉ · ⌈n / BLOCK_N⌉,), the columns of a row of blocks one after another. IS_EVEN: BLOCK_K divides k.
    """
    across = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = row < m, column < n
    depth = tl.arange(0, BLOCK_K)
    # rows and columns outside read those that are inside, and are not stored
    a_at = a + tl.where(in_m, row, 0)[:, None] * a_m + depth[None, :]
    b_at = b + tl.where(in_n, column, 0).to(tl.int64)[None, :] * b_n + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, k, BLOCK_K):
        if IS_EVEN:
            left, right = tl.load(a_at), tl.load(b_at)
        else:
            inside = start + depth < k
            left = tl.load(a_at, mask=inside[None, :], other=0)
            right = tl.load(b_at, mask=inside[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K
    value = sums.to(tl.float32) * tl.load(columns + column, mask=in_n, other=0.0).to(tl.float32)[None, :]
    value = value * tl.load(rows + row, mask=in_m, other=0.0)[:, None]
    if HAS_BIAS:
        value = value + tl.load(bias + column, mask=in_n, other=0.0)[None, :]
    tl.store(product + row[:, None] * n + column[None, :], value, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def negative_log_likelihood_kernel(
    logits: tl.tensor, targets: tl.tensor, nll: tl.tensor,
    vocabulary: tl.tensor, logits_m: tl.tensor, logits_v: tl.tensor, targets_m: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Of targets `[m]`, int64, under logits `[m, V]`: nll `[m]` float64, NaN where a logit is not finite; grid (m,).

    One pass: the sum of exponentials is carried relative to the largest logit so far (Milakov & Gimelshein 2018),
    float32 within a block and float64 from block to block.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), -_INFINITY, tl.float32)
    total = tl.full((), 0.0, tl.float64)
    spoiled = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < vocabulary
        x = tl.load(logits + row * logits_m + column * logits_v, mask=inside, other=-_INFINITY)
        spoiled = tl.where(_is_finite(x) | (column >= vocabulary), spoiled, 1)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher).to(tl.float64) + tl.sum(tl.exp(x - higher), axis=0).to(tl.float64)
        top = higher
    wanted = tl.load(logits + row * logits_m + tl.load(targets + row * targets_m) * logits_v).to(tl.float64)
    found = tl.log(total) + (top.to(tl.float64) - wanted)
    tl.store(nll + row, tl.where(tl.max(spoiled, axis=0) > 0, float("nan"), found))
