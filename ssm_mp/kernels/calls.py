"""The kernels as functions of tensors: pointers, strides and threads are dealt with here, and nowhere else.

Every tensor is float32 on the CPU unless it says otherwise; `usable` tells whether the kernels can take them.

Dimensions: `b` batch, `l` length, `I` inner, `N` state, `K` convolution kernel, `m` tokens, `k` inputs and `n` outputs
of a product, `V` vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor, nn

from ssm_mp.kernels.compiler import library

_LOG2_E = math.log2(math.e)

_IN_MEMORY = (Tensor, nn.Parameter)

MOST_KEYS = 1024
"""Largest size of a key head that `delta_rule` takes: it keeps some of each on the stack."""


class _Scan(ctypes.Structure):
    """`Scan` of scan.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "inner", "states")),
        *((name, c_void_p) for name in ("a", "dt", "A2t", "B", "C", "D", "z")),
        *((name, c_int64) for name in ("ld_dt", "ld_B", "ld_C", "ld_z")),
        *((name, c_void_p) for name in ("state", "y")),
    )


class _Delta(ctypes.Structure):
    """`Delta` of delta.c."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "key_heads", "value_heads", "keys", "values")),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("ld_q", "ld_k", "ld_v")),
        *((name, c_void_p) for name in ("g", "beta", "state", "last", "y")),
    )


class _Ssd(ctypes.Structure):
    """`Ssd` of ssd.c."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "heads", "width", "states", "groups")),
        *((name, c_void_p) for name in ("x", "dt", "A2", "B", "C", "D", "dt_bias")),
        *((name, c_int64) for name in ("ld_x", "ld_dt", "ld_B", "ld_C")),
        *((name, c_float) for name in ("low", "high")),
        *((name, c_void_p) for name in ("before", "state", "y", "steps", "scratch")),
    )


_ARGUMENTS = {
    "selective_scan": (POINTER(_Scan), c_int),
    "delta_rule": (POINTER(_Delta), c_int),
    "shared_step_recurrence": (c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "ssd_scan": (POINTER(_Ssd), c_int),
    "conv_silu": (*[c_int64] * 4, c_void_p, c_int64, *[c_void_p] * 4, c_int),
    "convolve": (*[c_int64] * 4, c_void_p, c_int64, *[c_void_p] * 4, c_int),
    "normalise_rows": (c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int),
    "gated_norm": (*[c_int64] * 3, c_void_p, c_void_p, c_int64, c_void_p, c_float, c_int, c_void_p, c_int),
    "quantize_static": (c_int64, c_int64, c_void_p, c_int64, c_float, c_void_p, c_void_p, c_int),
    "quantize_dynamic": (c_int64, c_int64, c_void_p, c_int64, c_float, c_void_p, c_void_p, c_int),
    "rescale": (c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "add_logits": (*[c_int64] * 3, *[c_void_p] * 3, c_int),
    "add_scaled_logits": (*[c_int64] * 3, *[c_void_p] * 5, c_int),
    "likelihoods": (c_int64, c_void_p, c_void_p),
    "divergence": (c_int64, c_int64, *[c_void_p] * 3, c_int),
    "count_magnitudes": (c_int64, c_int64, c_void_p, c_int64, c_float, c_int64, c_void_p),
}


@cache
def _kernels() -> ctypes.CDLL | None:
    """The library with its functions' arguments declared."""
    found = library()
    if found is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
        found.ssd_scratch.argtypes, found.ssd_scratch.restype = (c_int64,), c_int64
    return found


def compiled() -> bool:
    """Whether there are kernels on this machine; compiles them at the first call."""
    return _kernels() is not None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can compute with these tensors: compiled, on the CPU, float32, no gradient asked for, and no
    stand-ins without memory, with which a graph is traced."""
    wanted = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or (wanted and tensor.requires_grad):
            return False
        if type(tensor) not in _IN_MEMORY:
            return False
    return compiled()


def _library() -> ctypes.CDLL:
    found = _kernels()
    assert found is not None, "asked for kernels that are not there"
    return found


def _rows(x: Tensor) -> Tensor:
    """A tensor `[…, tokens, c]` whose tokens lie at even distances in memory, `stride(-2)`, each in one piece."""
    even = all(x.stride(i) == x.shape[i + 1] * x.stride(i + 1) for i in range(x.dim() - 2))
    return x if even and x.stride(-1) == 1 else x.contiguous()


def selective_scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssm_mp.kernels.scan.selective_scan_reference` on a CPU, states in registers."""
    b, length, inner = a.shape
    a, dt, B, C, z = a.contiguous(), _rows(dt), _rows(B), _rows(C), _rows(z)  # noqa: N806
    A2t, D = (A * _LOG2_E).t().contiguous(), D.contiguous()  # noqa: N806
    last = a.new_zeros(b, inner, A.shape[1]) if state is None else state.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(a)
    sizes = (b, length, inner, A.shape[1])
    pointers = (t.data_ptr() for t in (a, dt, A2t, B, C, D, z))
    strides = (dt.stride(1), B.stride(1), C.stride(1), z.stride(1))
    scan = _Scan(*sizes, *pointers, *strides, last.data_ptr(), y.data_ptr())
    _library().selective_scan(byref(scan), torch.get_num_threads())
    return y, last


def shared_step_recurrence(decay: Tensor, driven: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`h_t = decay_t ∘ h_{t−1} + driven_t` from `state [b, N]`: all states `[b, l, N]`, and the last one."""
    b, length, n = driven.shape
    decay, states, last = decay.contiguous(), driven.clone(memory_format=torch.contiguous_format), state.clone()
    _library().shared_step_recurrence(b, length, n, decay.data_ptr(), states.data_ptr(), last.data_ptr())
    return states, last


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssm_mp.kernels.delta.delta_rule_reference` on a CPU, for key heads up to `MOST_KEYS`."""
    b, length, heads, values = v.shape
    key_heads, keys = k.shape[2:]
    q, k, v = (_rows(x.flatten(2)) for x in (q, k, v))
    g, beta, state = g.contiguous(), beta.contiguous(), None if state is None else state.contiguous()
    last, y = v.new_empty(b, heads, keys, values), v.new_empty(b, length, heads, values)
    sizes = (b, length, key_heads, heads, keys, values)
    strides = (q.stride(1), k.stride(1), v.stride(1))
    ends = (g.data_ptr(), beta.data_ptr(), _pointer(state), last.data_ptr(), y.data_ptr())
    delta = _Delta(*sizes, q.data_ptr(), k.data_ptr(), v.data_ptr(), *strides, *ends)
    _library().delta_rule(byref(delta), torch.get_num_threads())
    return y, last


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,  # noqa: N803
    limits: tuple[float, float | None], state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssm_mp.kernels.ssd.ssd_scan_reference` on a CPU.

    The state lies `[b, H, N, P]` in memory, and is copied only if it comes in another order.
    """
    b, length, heads, width = x.shape
    groups, n = B.shape[2:]
    x, dt, B, C = _rows(x.flatten(2)), _rows(dt), _rows(B.flatten(2)), _rows(C.flatten(2))  # noqa: N806
    A2, D, dt_bias = A * _LOG2_E, D.contiguous(), dt_bias.contiguous()  # noqa: N806
    before = None if state is None else state.transpose(2, 3).contiguous()
    last, y, steps = (
        x.new_empty(b, heads, n, width),
        x.new_empty(b, length, heads, width),
        x.new_empty(b, length, heads),
    )
    found = _library()
    scratch = x.new_empty(groups * found.ssd_scratch(n))
    low, high = limits
    scan = _Ssd(
        b, length, heads, width, n, groups, *(t.data_ptr() for t in (x, dt, A2, B, C, D, dt_bias)),
        x.stride(1), dt.stride(1), B.stride(1), C.stride(1), low, math.inf if high is None else high,
        _pointer(before), last.data_ptr(), y.data_ptr(), steps.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    found.ssd_scan(byref(scan), torch.get_num_threads())
    return y, last.transpose(2, 3)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of `x [b, l, I]` by `weight [I, K]`; `before [b, K − 1, I]`."""
    return _convolved("conv_silu", x, weight, bias, before)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """The causal depthwise convolution of `x [b, l, I]` by `weight [I, K]`; `before [b, K − 1, I]`."""
    return _convolved("convolve", x, weight, bias, before)


def _convolved(kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    b, length, inner = x.shape
    x, taps, before = _rows(x), weight.t().contiguous(), before.contiguous()
    y = x.new_empty(b, length, inner)
    getattr(_library(), kernel)(
        b, length, inner, weight.shape[1], x.data_ptr(), x.stride(1), taps.data_ptr(), _pointer(bias),
        before.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of `x [..., d]` over its last dimension, or RMSNorm where there is no bias."""
    x, d = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    _library().normalise_rows(
        x.numel() // d, d, x.data_ptr(), d, weight.data_ptr(), _pointer(bias), eps, y.data_ptr(), d,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated_norm(y: Tensor, z: Tensor, weight: Tensor | None, groups: int, eps: float, norm_first: bool) -> Tensor:
    """`ssm_mp.kernels.gated_norm.gated_norm_reference` on a CPU; without a weight there is no norm."""
    y, z = y.contiguous(), _rows(z)
    weight = None if weight is None else weight.contiguous()
    out, inner = torch.empty_like(y), y.shape[-1]
    _library().gated_norm(
        y.numel() // inner, inner, groups, y.data_ptr(), z.data_ptr(), z.stride(-2), _pointer(weight), eps, norm_first,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def quantize_static(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`x [m, k]` with one scale: int8 `[m, k]`, and the scale of each row `[m, 1]`, NaN where one is not finite."""
    return _quantized("quantize_static", x, scale)


def quantize_dynamic(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """`x [m, k]` with each row's own scale, at least `smallest`: int8 `[m, k]` and the scales `[m, 1]`."""
    return _quantized("quantize_dynamic", x, smallest)


def _quantized(kernel: str, x: Tensor, number: float) -> tuple[Tensor, Tensor]:
    x = _rows(x)
    m, k = x.shape
    q, scales = torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1)
    getattr(_library(), kernel)(
        m, k, x.data_ptr(), x.stride(0), number, q.data_ptr(), scales.data_ptr(), torch.get_num_threads()
    )
    return q, scales


def rescale(sums: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """int32 `sums [m, n]` · `columns [n]` · `rows [m, 1]` + `bias [n]`: float32 `[m, n]` in the memory of `sums`."""
    sums, columns, rows = sums.contiguous(), columns.contiguous(), rows.contiguous()  # a precision's own may not be
    m, n = sums.shape
    _library().rescale(
        m, n, sums.data_ptr(), columns.data_ptr(), rows.data_ptr(), _pointer(bias), torch.get_num_threads()
    )
    return sums.view(torch.float32)


class LogSums:
    """Likelihoods of `targets [m]`, int64, under logits `[m, V]` that come as blocks of neighbouring columns."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets.contiguous()
        self._sums = torch.tensor((-math.inf, 0.0, 0.0), dtype=torch.float64).repeat(targets.shape[0], 1)

    def add(self, logits: Tensor, first: int) -> None:
        """The logits `[m, n]` of the columns from `first` on."""
        logits = logits.contiguous()
        m, n = logits.shape
        _library().add_logits(
            m, n, first, logits.data_ptr(), self._targets.data_ptr(), self._sums.data_ptr(), torch.get_num_threads()
        )

    def add_scaled(self, sums: Tensor, columns: Tensor, rows: Tensor, first: int) -> None:
        """The same of logits int32 `sums [m, n]` · `columns [n]` · `rows [m, 1]`; `sums` is spoilt."""
        sums, columns, rows = (tensor.contiguous() for tensor in (sums, columns, rows))
        m, n = sums.shape
        _library().add_scaled_logits(
            m, n, first, sums.data_ptr(), columns.data_ptr(), rows.data_ptr(), self._targets.data_ptr(),
            self._sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def nll(self) -> Tensor:
        """Of every target, once all columns are there: float64 `[m]`."""
        nll = torch.empty(self._sums.shape[0], dtype=torch.float64)
        _library().likelihoods(nll.numel(), self._sums.data_ptr(), nll.data_ptr())
        return nll


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Of `targets [m]`, int64, under `logits [m, V]`: float64 `[m]`."""
    sums = LogSums(targets)
    sums.add(logits, 0)
    return sums.nll()


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(expected ‖ logits) of each row of logits `[m, V]`: float64 `[m]`."""
    logits, expected = logits.contiguous(), expected.contiguous()
    m, vocabulary = logits.shape
    kl = torch.empty(m, dtype=torch.float64)
    _library().divergence(m, vocabulary, logits.data_ptr(), expected.data_ptr(), kl.data_ptr(), torch.get_num_threads())
    return kl


def count_magnitudes(x: Tensor, factor: float, counts: Tensor) -> None:
    """Add to `counts [bins]`, int64, how many magnitudes of `x [..., k]` times `factor` are in `[i, i + 1)`, in one
    thread; the last bin counts those beyond it too."""
    x = _rows(x)
    k = x.shape[-1]
    _library().count_magnitudes(
        x.numel() // k, k, x.data_ptr(), x.stride(-2) if x.dim() > 1 else k, factor, counts.numel(), counts.data_ptr()
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
