"""The scan of Mamba-2, state-space duality (Dao & Gu 2024): a reference, one out of matmuls, and the fastest there is.

A scan computes

    (x, dt, A, B, C, D, dt_bias, limits, state) → (y, last state)

from the convolved channels `x` of each head and the state before the first token (None: zeros).

Dimensions: `b` batch, `l` length, `H` heads, `P` channels of a head, `N` state, `G` groups of heads, `c` chunks,
`q` tokens of a chunk, `R` heads of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import calls

CHUNK = 64
"""Tokens of a chunk of `ssd_scan_chunked`."""

Limits = tuple[float, float | None]
"""The least and the greatest step; None: no greatest."""


def ssd_steps(dt: Tensor, dt_bias: Tensor, limits: Limits) -> Tensor:
    """The steps `[b, l, H]` out of projected `dt [b, l, H]` and `dt_bias [H]`: softplus, then the limits."""
    return F.softplus(dt + dt_bias).clamp(*limits)


def ssd_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,  # noqa: N803
    limits: Limits = (0.0, None), state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2's scan, one step of time after another, differentiable, any float type.

    x: `[b, l, H, P]`; dt: `[b, l, H]`, before its bias and softplus; A: `[H]`, negative; B, C: `[b, l, G, N]`;
    D, dt_bias: `[H]`; limits: of the steps; state: `[b, H, P, N]`. Returns `[b, l, H, P]` and the last state.
    Source: Dao & Gu 2024, section 2 and `selective_state_update` of mamba_ssm.
    """
    heads, width = x.shape[2:]
    steps = ssd_steps(dt, dt_bias, limits)
    B, C = (values.repeat_interleave(heads // values.shape[2], dim=2) for values in (B, C))  # [b, l, H, N]  # noqa: N806
    if state is None:
        state = x.new_zeros(x.shape[0], heads, width, B.shape[3])
    outputs = []
    for x_t, step, B_t, C_t in zip(*(values.unbind(dim=1) for values in (x, steps, B, C)), strict=True):  # noqa: N806
        decay = torch.exp(step * A)[:, :, None, None]
        state = decay * state + (step[:, :, None] * x_t)[..., None] * B_t[:, :, None, :]
        outputs.append((state * C_t[:, :, None, :]).sum(dim=-1) + D[:, None] * x_t)
    return torch.stack(outputs, dim=1), state


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,  # noqa: N803
    limits: Limits = (0.0, None), state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same scan by the fastest way there is; arguments as in `ssd_scan_reference`."""
    wanted = (x, dt, A, B, C, D, dt_bias) if state is None else (x, dt, A, B, C, D, dt_bias, state)
    if calls.usable(*wanted):
        return calls.ssd_scan(x, dt, A, B, C, D, dt_bias, limits, state)
    scan = ssd_scan_reference if x.shape[1] == 1 else ssd_scan_chunked
    return scan(x, dt, A, B, C, D, dt_bias, limits, state)


def ssd_scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,  # noqa: N803
    limits: Limits = (0.0, None), state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same scan out of matmuls, differentiable, chunk after chunk; arguments as in `ssd_scan_reference`.

    Within a chunk the outputs are those of masked attention; a state goes from chunk to chunk.
    Source: Dao & Gu 2024, section 6 and listing 1.
    """
    b, length, heads, width = x.shape
    groups, n = B.shape[2:]
    per_group = heads // groups
    q = min(CHUNK, length)
    steps = ssd_steps(dt, dt_bias, limits)
    # tokens that fill the last chunk have steps of zero: they change no state
    steps, filled, B, C = (_filled(values, -length % q) for values in (steps, x, B, C))  # noqa: N806
    steps = steps.reshape(b, -1, q, groups, per_group).permute(0, 1, 3, 4, 2)  # [b, c, G, R, q]
    driven = filled.reshape(b, -1, q, groups, per_group, width).permute(0, 1, 3, 4, 2, 5) * steps[..., None]
    B, C = (values.reshape(b, -1, q, groups, n).transpose(2, 3) for values in (B, C))  # [b, c, G, q, N]  # noqa: N806

    decays = steps * A.reshape(groups, per_group, 1)  # logarithms
    between = _between(decays)  # [b, c, G, R, q, q]
    scores = (C @ B.transpose(-1, -2))[:, :, :, None] * between
    y = scores @ driven  # [b, c, G, R, q, P]

    to_end = driven * between[..., -1, :, None]
    gained = to_end.transpose(-1, -2) @ B[:, :, :, None]  # [b, c, G, R, P, N]
    total = decays.sum(dim=-1).exp()[..., None, None]
    held = x.new_zeros(b, heads, width, n) if state is None else state
    held = held.reshape(b, groups, per_group, width, n)
    before = []  # of each chunk
    for total_c, gained_c in zip(total.unbind(dim=1), gained.unbind(dim=1), strict=True):
        before.append(held)
        held = total_c * held + gained_c
    carried = C[:, :, :, None] @ torch.stack(before, dim=1).transpose(-1, -2)  # [b, c, G, R, q, P]
    y = y + carried * decays.cumsum(dim=-1).exp()[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, -1, heads, width)[:, :length]
    return torch.addcmul(y, x, D[:, None]), held.reshape(b, heads, width, n)


def _filled(values: Tensor, missing: int) -> Tensor:
    """`[b, l, …]` with `missing` zeros behind."""
    return F.pad(values, (0, 0) * (values.dim() - 2) + (0, missing)) if missing else values


def _between(decays: Tensor) -> Tensor:
    """What is left at token `i` of what token `j` brought, of logarithms `[…, q]`: `[…, q, q]`, zeros where j > i.

    Sums of the logarithms between the two, not differences of sums from the beginning, which large ones spoil.
    """
    q = decays.shape[-1]
    ones = torch.ones(q, q, dtype=torch.bool, device=decays.device)
    sums = decays[..., None].expand(*decays.shape, q).masked_fill(~ones.tril(-1), 0).cumsum(dim=-2)
    return sums.masked_fill(~ones.tril(), -torch.inf).exp()
