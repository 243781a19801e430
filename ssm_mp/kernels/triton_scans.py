"""The scans as Triton kernels: state in registers, the loop in time inside. Importing this needs Triton.

Dimensions: `b` batch, `l` length, `I` inner, `N` state; a program holds `BLOCK_N ≥ N` states of `BLOCK_I` channels.

Under TRITON_INTERPRET=1, set before the import, the same kernels run on a CPU without a driver.
"""

# a kernel takes a flat list of arguments, in the field's names
# ruff: noqa: N803, N806, PLR0913, PLR0917
# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = 2^(x · log2 e)."""


@triton.jit
def _log1p(u: tl.tensor) -> tl.tensor:
    """log(1 + u) for 0 ≤ u ≤ 1, to float32's rounding even where 1 + u would round u away.

    2·atanh(s) with s = u/(2 + u) ≤ 1/3 as a series: it needs no logarithm, which on a GPU may be approximate.
    """
    s = u / (2.0 + u)
    q = s * s  # ≤ 1/9, so the first term left out is below 1e-9
    series = 1.0 / 15.0 + q * (1.0 / 17.0)
    series = 1.0 / 13.0 + q * series
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return 2.0 * s * (1.0 + q * series)


@triton.jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), without overflow at either end."""
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    """x·sigmoid(x), without overflow: exp is only taken of what is not positive."""
    e = tl.exp(-tl.abs(x))
    return x * tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def selective_scan_kernel(
    a: tl.tensor, dt: tl.tensor, A: tl.tensor, B: tl.tensor, C: tl.tensor, D: tl.tensor, z: tl.tensor,
    first: tl.tensor, y: tl.tensor, last: tl.tensor,
    length: tl.tensor, inner: tl.tensor, states: tl.tensor,
    a_b: tl.tensor, a_l: tl.tensor, a_i: tl.tensor,
    dt_b: tl.tensor, dt_l: tl.tensor, dt_i: tl.tensor,
    B_b: tl.tensor, B_l: tl.tensor, B_n: tl.tensor,
    C_b: tl.tensor, C_l: tl.tensor, C_n: tl.tensor,
    z_b: tl.tensor, z_l: tl.tensor, z_i: tl.tensor,
    HAS_STATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
) -> None:  # fmt: skip
    """One sequence and `BLOCK_I` channels a program: grid (b, ⌈I / BLOCK_I⌉).

    `name_axis` are strides in elements; A `[N, I]`, D `[I]`, first and last `[b, N, I]`, y `[b, l, I]` are contiguous:
    channels last, so that they spread over a warp's lanes and the sum over states stays within a lane.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    in_i, in_n = i < inner, n < states
    both = in_n[:, None] & in_i[None, :]  # [BLOCK_N, BLOCK_I]
    at = n[:, None] * inner + i[None, :]
    rate = tl.load(A + at, mask=both, other=0.0) * _LOG2_E
    skip = tl.load(D + i, mask=in_i, other=0.0).to(tl.float32)
    if HAS_STATE:
        h = tl.load(first + row * inner * states + at, mask=both, other=0.0)
    else:
        h = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    a_at, dt_at, z_at = a + row * a_b + i * a_i, dt + row * dt_b + i * dt_i, z + row * z_b + i * z_i
    B_at, C_at = B + row * B_b + n * B_n, C + row * C_b + n * C_n
    y_at = y + row * length * inner + i
    for _ in tl.range(0, length, num_stages=3):  # loads of the next steps are under way during this one
        a_t = tl.load(a_at, mask=in_i, other=0.0).to(tl.float32)
        step = _softplus(tl.load(dt_at, mask=in_i, other=0.0).to(tl.float32))
        B_t = tl.load(B_at, mask=in_n, other=0.0).to(tl.float32)
        C_t = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
        gate = _silu(tl.load(z_at, mask=in_i, other=0.0).to(tl.float32))
        h = tl.exp2(step[None, :] * rate) * h + (step * a_t)[None, :] * B_t[:, None]
        out = (tl.sum(h * C_t[:, None], axis=0) + skip * a_t) * gate
        tl.store(y_at, out.to(y.dtype.element_ty), mask=in_i)
        a_at += a_l
        dt_at += dt_l
        B_at += B_l
        C_at += C_l
        z_at += z_l
        y_at += inner
    tl.store(last + row * inner * states + at, h, mask=both)


@triton.jit
def shared_step_kernel(
    decay: tl.tensor, driven: tl.tensor, first: tl.tensor, states_out: tl.tensor,
    length: tl.tensor, states: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """`h_t = decay_t ∘ h_{t−1} + driven_t`: one sequence a program, grid (b,).

    decay, driven and states_out `[b, l, N]`, first `[b, N]`; all contiguous float32.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < states
    h = tl.load(first + row * states + n, mask=inside, other=0.0)
    at = row * length * states + n
    decay_at, driven_at, out_at = decay + at, driven + at, states_out + at
    for _ in tl.range(0, length, num_stages=3):
        h = tl.load(decay_at, mask=inside, other=0.0) * h + tl.load(driven_at, mask=inside, other=0.0)
        tl.store(out_at, h, mask=inside)
        decay_at += states
        driven_at += states
        out_at += states
