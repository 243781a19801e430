"""The passes around a product on CUDA by Triton kernels, forward only; contracts and names are those of `calls.py`.

Every tensor is float32 on one GPU unless it says otherwise; `usable` tells whether the kernels can take them. Nothing
here waits for the GPU.

Dimensions: `b` batch, `l` length, `I` inner, `K` convolution kernel, `m` tokens, `k` inputs and `n` outputs of a
product, `V` vocabulary.

Triton is imported at the first call, so that this file can be asked where there is none.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

_TILE = 2048
"""Values of a matrix that a program holds at a time: 16 a thread."""
_WIDEST = 1024
"""Values of a row that are quantised at a time; one program goes through all of a row, whose scale it finds."""
_CHANNELS = 128
"""Neighbours in memory that the convolution and the rescaling take at a time."""
_LOGITS = 4096
"""Logits of a row at a time: many for each reduction over a block."""
_FEW_ROWS, _SOME_ROWS = 32, 2048
"""Rows of a product up to which its blocks are smaller."""
_FUSED = {"enable_fp_fusion": True}
"""A multiplication and an addition are one instruction."""
_EXACT = {"enable_fp_fusion": False}
"""Each operation is rounded on its own, as torch's operators round."""


@cache
def compiles() -> bool:
    """Whether Triton is there and can compile for this GPU, tried once; that it cannot is logged with the reason."""
    try:
        _tried()
    except Exception as error:  # Triton has no root error of its own: no compiler, no Python headers, too old a GPU …
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.getLogger("ssm_mp").warning("note: computing on the GPU without Triton's kernels, slower: %s", reason)
        return False
    return True


def _tried() -> None:
    """Compile and launch one kernel; raises whatever keeps Triton from that."""
    quantize_static(torch.ones(1, 1, device="cuda"), torch.ones(1, device="cuda"))


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can compute with these tensors: on CUDA, float32, no gradient asked for, Triton compiles."""
    wanted = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cuda or tensor.dtype != torch.float32 or (wanted and tensor.requires_grad):
            return False
    return compiles()


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of `x [b, l, I]` by `weight [I, K]`; `before [b, K − 1, I]`."""
    from ssm_mp.kernels.triton_kernels import conv_silu_kernel

    b, length, inner = x.shape
    y = torch.empty(b, length, inner, device=x.device)
    block_m, block_i = _tile(b * length, inner, _CHANNELS)
    with torch.cuda.device_of(x):
        conv_silu_kernel[(_blocks(b * length, block_m), _blocks(inner, block_i))](
            x, weight, weight if bias is None else bias.contiguous(), before, y, b * length, length, inner,
            *x.stride(), *weight.stride(), *before.stride(),
            HAS_BIAS=bias is not None, K=weight.shape[1], BLOCK_M=block_m, BLOCK_I=block_i, **_FUSED,
        )  # fmt: skip
    return y


def quantize_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x [m, k]` with one scale: int8 `[m, k]`, and the scale of each row `[m, 1]`, NaN where one is not finite.

    scale: `[1]` in any float type; a tensor, since reading its value would wait for the GPU.
    """
    from ssm_mp.kernels.triton_kernels import quantize_static_kernel

    return _quantized(quantize_static_kernel, x, scale)


def quantize_dynamic(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """`x [m, k]` with each row's own scale, at least `smallest`: int8 `[m, k]` and the scales `[m, 1]`."""
    from ssm_mp.kernels.triton_kernels import quantize_dynamic_kernel

    return _quantized(quantize_dynamic_kernel, x, smallest)


def _quantized(kernel, x: Tensor, number: Tensor | float) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, 1, device=x.device)
    block_m, block_k = _tile(m, k, _WIDEST)
    with torch.cuda.device_of(x):
        kernel[(_blocks(m, block_m),)](
            x, number, q, scales, m, k, *x.stride(), BLOCK_M=block_m, BLOCK_K=block_k, **_EXACT
        )
    return q, scales


def rescale(sums: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """int32 `sums [m, n]` · `columns [n]` · `rows [m, 1]` + `bias [n]`: float32 `[m, n]` in the memory of `sums`.

    sums: rows may lie apart, each in one piece, as those of a padded product do.
    """
    from ssm_mp.kernels.triton_kernels import rescale_kernel

    m, n = sums.shape
    assert sums.stride(1) == 1 or n == 1
    product = sums.view(torch.float32)
    block_m, block_n = _tile(m, n, _CHANNELS)
    with torch.cuda.device_of(sums):
        rescale_kernel[(_blocks(m, block_m), _blocks(n, block_n))](
            sums, columns.contiguous(), rows.contiguous(), columns if bias is None else bias.contiguous(), product,
            m, n, sums.stride(0), HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, **_EXACT,
        )  # fmt: skip
    return product


def scaled_product(a: Tensor, b: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """`rescale` of the integer product of `a [m, k]` and `b [n, k]`, int8, whose sums are never in memory: `[m, n]`.

    columns: `[n]` in any float type.
    """
    from ssm_mp.kernels.triton_kernels import scaled_product_kernel

    (m, k), n = a.shape, b.shape[0]
    assert a.stride(1) == 1
    assert b.stride(1) == 1
    product = torch.empty(m, n, device=a.device)
    tile = _product_tile(m, n, k)
    with torch.cuda.device_of(a):
        scaled_product_kernel[(_blocks(m, tile["BLOCK_M"]) * _blocks(n, tile["BLOCK_N"]),)](
            a, b, columns.contiguous(), rows.contiguous(), columns if bias is None else bias.contiguous(), product,
            m, n, k, a.stride(0), b.stride(0), HAS_BIAS=bias is not None, IS_EVEN=k % tile["BLOCK_K"] == 0,
            **tile, **_EXACT,
        )  # fmt: skip
    return product


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Of `targets [m]`, int64, under `logits [m, V]`: float64 `[m]`."""
    from ssm_mp.kernels.triton_kernels import negative_log_likelihood_kernel

    m, vocabulary = logits.shape
    nll = torch.empty(m, dtype=torch.float64, device=logits.device)
    with torch.cuda.device_of(logits):
        negative_log_likelihood_kernel[(m,)](
            logits, targets, nll, vocabulary, *logits.stride(), targets.stride(0),
            BLOCK_V=min(_LOGITS, _power_of_two(vocabulary)), **_FUSED,
        )  # fmt: skip
    return nll


def _product_tile(m: int, n: int, k: int) -> dict[str, int]:
    """Block and launch of a product: the fewer rows, the smaller, so that blocks still fill a GPU."""
    side = 16 if m <= _FEW_ROWS else 64 if m <= _SOME_ROWS else 128
    deep = max(32, min(128, _power_of_two(k)))
    width = max(16, min(max(32, side), _power_of_two(n)))
    return {"BLOCK_M": side, "BLOCK_N": width, "BLOCK_K": deep, "num_warps": 4, "num_stages": 3}


def _tile(rows: int, columns: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a program's block: the columns first, rows as many as fill the block."""
    width = min(widest, _power_of_two(columns))
    return min(_TILE // width, _power_of_two(rows)), width


def _blocks(number: int, block: int) -> int:
    return -(-number // block)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
