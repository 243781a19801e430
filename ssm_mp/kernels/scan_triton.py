"""The scans of both families on CUDA by Triton kernels, forward only; the contract is that of `scan.py`.

Dimensions: `b` batch, `l` length, `I` inner, `N` state.

Triton is imported at the first scan, so that this file can be asked where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_mp.kernels import cuda

_BLOCK_INNER = 32
"""Channels of a program, one a lane of a warp: small programs, so that few sequences still fill a GPU."""
_LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
"""Of every kernel; without fusion each multiply and add would be two instructions."""


def available() -> bool:
    """Whether there is a GPU that Triton compiles for."""
    return torch.cuda.is_available() and cuda.compiles()


def selective_scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's scan with step size, skip and gate (selective_scan_fn of mamba_ssm); the state is float32 throughout.

    a: `[b, l, I]`; dt: `[b, l, I]` before softplus; A: `[I, N]`, negative; B, C: `[b, l, N]`; D: `[I]`;
    z: `[b, l, I]` before SiLU; state: `[b, I, N]` float32, None for zeros. All but A, D and the state may be
    strided views, in any float type. Returns y `[b, l, I]` in the type of `a`, and the last state `[b, I, N]`.
    """
    from ssm_mp.kernels.triton_scans import selective_scan_kernel

    b, length, inner = a.shape
    states = A.shape[1]
    y = torch.empty(b, length, inner, dtype=a.dtype, device=a.device)
    last = torch.empty(b, states, inner, dtype=torch.float32, device=a.device)
    first = last if state is None else state.transpose(1, 2).float().contiguous()  # [b, N, I]
    blocks = -(-inner // _BLOCK_INNER)
    with torch.cuda.device_of(a):
        selective_scan_kernel[(b, blocks)](
            a, dt, A.t().float().contiguous(), B, C, D.contiguous(), z, first, y, last,
            length, inner, states,
            *a.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride(),
            HAS_STATE=state is not None, BLOCK_N=_power_of_two(states), BLOCK_I=_BLOCK_INNER, **_LAUNCH,
        )  # fmt: skip
    return y, last.transpose(1, 2)


def shared_step_recurrence(decay: Tensor, driven: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`h_t = decay_t ∘ h_{t−1} + driven_t`, the recurrence of the `itera` scan, in one launch.

    decay, driven: `[b, l, N]`; state: `[b, N]`, the one before; all float32. Returns all states `[b, l, N]` and the
    last one.
    """
    from ssm_mp.kernels.triton_scans import shared_step_kernel

    b, length, size = driven.shape
    states = torch.empty(b, length, size, dtype=driven.dtype, device=driven.device)
    with torch.cuda.device_of(driven):
        shared_step_kernel[(b,)](
            decay.contiguous(), driven.contiguous(), state.contiguous(), states, length, size,
            BLOCK_N=_power_of_two(size), **_LAUNCH,
        )  # fmt: skip
    return states, states[:, -1].clone()


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
