"""Selective scans of the two families, each with a readable reference; the fastest that the machine has is taken.

A scan is forward only in all but the references, and computes

    (a, dt, A, B, C, D, z, state) → (y, last state)

from the convolved channels `a`, the gate `z`, and the state before the first token (None: zeros).

Dimensions: `b` batch, `l` length, `I` inner, `N` state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import calls, scan_mamba_ssm, scan_triton

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`(a, dt, A, B, C, D, z, state) → (y, last state)`, shapes as in the reference of the family's own scan."""


def selective_scan_reference(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's scan, one step of time after another, differentiable, any float type.

    a: `[b, l, I]`; dt: `[b, l, I]`, before softplus; A: `[I, N]`, negative; B, C: `[b, l, N]`; D: `[I]`;
    z: `[b, l, I]`, before SiLU; state: `[b, I, N]`. Returns `[b, l, I]`, gated, and the last state.
    Source: Gu & Dao 2023, algorithm 2; `selective_scan_fn` of mamba_ssm.
    """
    delta = F.softplus(dt)
    if state is None:
        state = a.new_zeros(a.shape[0], a.shape[2], A.shape[1])  # [b, I, N]
    outputs = []
    # unbound once: the gradient of a[:, t] would be a whole tensor of zeros at every step
    for a_t, delta_t, B_t, C_t in zip(*(values.unbind(dim=1) for values in (a, delta, B, C)), strict=True):  # noqa: N806
        decay = torch.exp(delta_t[:, :, None] * A)
        state = decay * state + (delta_t * a_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(dim=-1) + D * a_t)
    return torch.stack(outputs, dim=1) * F.silu(z), state


def selective_scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same scan, forward only, by the fastest way there is; arguments as in `selective_scan_reference`."""
    if calls.usable(a, dt, A, B, C, D, z):
        return calls.selective_scan(a, dt, A, B, C, D, z, state)
    scan = _cuda_scan() if a.is_cuda else selective_scan_steps
    return scan(a, dt, A, B, C, D, z, state)


@cache
def _cuda_scan() -> Scan:
    """mamba_ssm's kernel where it is installed with its CUDA part, else Triton's where there is Triton."""
    if not scan_triton.available():
        logging.getLogger("ssm_mp").warning("note: scanning on the GPU without Triton, many times slower")
        return selective_scan_steps
    if scan_mamba_ssm.available():
        return scan_mamba_ssm.make_selective_scan(scan_triton.selective_scan)
    return scan_triton.selective_scan


def selective_scan_steps(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same scan out of torch's own operators, in place, for machines without a compiler.

    The state is held `[b, N, I]`: every operand then broadcasts along contiguous memory.
    """
    b, length, inner = a.shape
    A_t = A.t().contiguous()  # [N, I]  # noqa: N806
    delta = F.softplus(dt)
    driven = delta * a
    held = a.new_zeros(b, A.shape[1], inner) if state is None else state.transpose(1, 2).contiguous()
    decay = torch.empty_like(held)
    y = a.new_empty(b, length, inner)
    for t in range(length):
        torch.mul(delta[:, t, None, :], A_t, out=decay)
        held.mul_(decay.exp_()).addcmul_(driven[:, t, None, :], B[:, t, :, None])
        torch.bmm(C[:, t, None, :], held, out=y[:, t : t + 1])
    return torch.addcmul(y, a, D).mul_(F.silu(z)), held.transpose(1, 2).contiguous()


def shared_step_scan_reference(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `itera` scan (design, section 4): one step size a token, state shared by the channels; differentiable.

    a: `[b, l, I]`; dt: `[b, l, I]`, before softplus, whose mean over the channels is the step; A: `[N]`, negative;
    B: `[N, I]`; C: `[I, N]`; D: `[I]`; z: `[b, l, I]`, before SiLU; state: `[b, N]`. Returns `[b, l, I]` and `[b, N]`.
    """
    delta = F.softplus(dt).mean(dim=-1)  # [b, l]
    if state is None:
        state = a.new_zeros(a.shape[0], A.shape[0])  # [b, N]
    outputs = []
    for a_t, delta_t in zip(a.unbind(dim=1), delta.unbind(dim=1), strict=True):
        step = delta_t[:, None]
        state = torch.exp(step * A) * state + step * (a_t @ B.t())
        outputs.append(state @ C.t() + D * a_t)
    return torch.stack(outputs, dim=1) * F.silu(z), state


def shared_step_scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with all products of matrices taken outside the loop; arguments as in the reference."""
    delta = F.softplus(dt).mean(dim=-1, keepdim=True)  # [b, l, 1]
    decay = torch.exp(delta * A)  # [b, l, N]
    driven = delta * (a @ B.t())  # [b, l, N]
    if state is None:
        state = a.new_zeros(a.shape[0], A.shape[0])
    states, last = _recurrence(decay, driven, state)(decay, driven, state)
    return torch.addcmul(states @ C.t(), a, D).mul_(F.silu(z)), last


def _recurrence(*inputs: Tensor) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The fastest way to compute `shared_step_recurrence` of these inputs."""
    if calls.usable(*inputs):
        return calls.shared_step_recurrence
    on_gpu = inputs[0].is_cuda and scan_triton.available()
    return scan_triton.shared_step_recurrence if on_gpu else shared_step_recurrence


def shared_step_recurrence(decay: Tensor, driven: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`h_t = decay_t ∘ h_{t−1} + driven_t` from `state [b, N]`: all states `[b, l, N]`, and the last one."""
    states = driven.clone()
    for t in range(driven.shape[1]):
        states[:, t].addcmul_(decay[:, t], state)
        state = states[:, t]
    return states, state.clone()
