"""Selective scans of the two families, each with a readable reference.

Dimensions: `b` batch, `l` length, `I` inner, `N` state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(x, delta, A, B, C, D) → y`, shapes as in the reference of the family's own scan."""


def selective_scan_reference(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:  # noqa: N803
    """Mamba's scan, one step of time after another (Gu & Dao 2023, algorithm 2), differentiable, any float type.

    x, delta: `[b, l, I]`; A: `[I, N]`, negative; B, C: `[b, l, N]`; D: `[I]`. Returns `[b, l, I]`.
    """
    state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])  # [b, I, N]
    outputs = []
    # unbound once: the gradient of x[:, t] would be a whole tensor of zeros at every step
    for x_t, delta_t, B_t, C_t in zip(*(values.unbind(dim=1) for values in (x, delta, B, C)), strict=True):  # noqa: N806
        decay = torch.exp(delta_t[:, :, None] * A)
        state = decay * state + (delta_t * x_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(dim=-1) + D * x_t)
    return torch.stack(outputs, dim=1)


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:  # noqa: N803
    """The same scan, forward only, in place; arguments as in `selective_scan_reference`.

    The state is held `[b, N, I]`: every operand then broadcasts along contiguous memory.
    """
    b, length, inner = x.shape
    A_t = A.t().contiguous()  # [N, I]  # noqa: N806
    driven = delta * x
    state = x.new_zeros(b, A.shape[1], inner)
    decay = torch.empty_like(state)
    y = x.new_empty(b, length, inner)
    for t in range(length):
        torch.mul(delta[:, t, None, :], A_t, out=decay)
        state.mul_(decay.exp_()).addcmul_(driven[:, t, None, :], B[:, t, :, None])
        torch.bmm(C[:, t, None, :], state, out=y[:, t : t + 1])
    return torch.addcmul(y, x, D)


def shared_step_scan_reference(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:  # noqa: N803
    """The `itera` scan (design, section 4): one step size a token, state shared by the channels; differentiable.

    x: `[b, l, I]`; delta: `[b, l]`; A: `[N]`, negative; B: `[N, I]`; C: `[I, N]`; D: `[I]`. Returns `[b, l, I]`.
    """
    state = x.new_zeros(x.shape[0], A.shape[0])  # [b, N]
    outputs = []
    for x_t, delta_t in zip(x.unbind(dim=1), delta.unbind(dim=1), strict=True):
        step = delta_t[:, None]
        state = torch.exp(step * A) * state + step * (x_t @ B.t())
        outputs.append(state @ C.t() + D * x_t)
    return torch.stack(outputs, dim=1)


def shared_step_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:  # noqa: N803
    """The same with all products of matrices taken outside the loop; arguments as in the reference."""
    decay = torch.exp(delta[:, :, None] * A)  # [b, l, N]
    states = delta[:, :, None] * (x @ B.t())  # [b, l, N]
    for t in range(1, x.shape[1]):
        states[:, t].addcmul_(decay[:, t], states[:, t - 1])
    return torch.addcmul(states @ C.t(), x, D)
