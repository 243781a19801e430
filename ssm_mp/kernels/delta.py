"""The gated delta rule (Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks"): a readable reference, the same in
chunks of tokens, and the fastest that the machine has.

Each computes `(q, k, v, g, beta, state) → (y, last state)` for every value head:

    S = e^g S;   S = S + k (β (v − kᵀ S));   y = qᵀ S

with q and k of length one and q over √n. Value heads that follow each other share a key head.

Dimensions: `b` batch, `l` length, `G` key heads, `H` value heads, `n` keys and `m` values of a head, `c` chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import calls

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`(q, k, v, g, beta, state) → (y, last state)`, shapes as in the reference."""

CHUNK = 64
"""Tokens that torch takes at once."""
FEW_TOKENS = 4
"""So many are faster one after another than as a chunk."""
NORM_EPS = 1e-6


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of time after another, differentiable, any float type.

    q, k: `[b, l, G, n]`, of any length; v: `[b, l, H, m]`; g: `[b, l, H]`, log of the decay, at most 0;
    beta: `[b, l, H]`; state: `[b, H, n, m]`. Returns `[b, l, H, m]`, and the last state.
    Source: transformers' `torch_recurrent_gated_delta_rule`, with its l2 norm.
    """
    q, k = _heads(q, k, v.shape[2])
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    outputs = []
    # unbound once: the gradient of q[:, t] would be a whole tensor of zeros at every step
    for q_t, k_t, v_t, g_t, beta_t in zip(*(values.unbind(dim=1) for values in (q, k, v, g, beta)), strict=True):
        state = g_t.exp()[..., None, None] * state
        delta = beta_t[..., None] * (v_t - (k_t[..., None, :] @ state)[..., 0, :])  # [b, H, m]
        state = state + k_t[..., :, None] * delta[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, dim=1), state


def delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as products of matrices, chunk after chunk; differentiable, any float type; arguments as in the
    reference.

    Source: section 3.3 of the paper, transformers' `torch_chunk_gated_delta_rule`.
    """
    length, heads = v.shape[1], v.shape[2]
    q, k = _heads(q, k, heads)
    chunk = min(CHUNK, length)
    q, k, v, g, beta = (_in_chunks(values, chunk) for values in (q, k, v, g[..., None], beta[..., None]))
    # summed from each token on: differences of sums from the beginning would lose digits after a strong decay
    steps = g.expand(*g.shape[:-1], chunk).tril(-1).cumsum(dim=-2)  # [.., c, c]: from token j to token i
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).triu(1)
    decay = steps.masked_fill(later, -torch.inf).exp()
    since = g.cumsum(dim=-2)  # [.., c, 1]: from before the chunk
    keys = k * beta
    among = (keys @ k.mT * decay).tril(-1)
    # what tokens would write to an empty state, and what they then take back for what is in it
    drives = torch.cat((v * beta, keys * since.exp()), dim=-1)
    solved = torch.linalg.solve_triangular(among, drives, upper=False, unitriangular=True)
    writes, takes = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    asked = q @ k.mT * decay
    q = q * since.exp()
    k = k * decay[..., -1, :, None]
    left = since[..., -1:, :].exp()  # [.., 1, 1]
    if state is None:
        state = v.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1])
    outputs = []
    for i in range(v.shape[0]):
        written = writes[i] - takes[i] @ state
        outputs.append(q[i] @ state + asked[i] @ written)
        state = left[i] * state + k[i].mT @ written
    y = torch.stack(outputs, dim=2)  # [b, H, chunks, c, m]
    return y.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the fastest way there is for these tensors; arguments as in the reference."""
    held = () if state is None else (state,)
    if calls.usable(q, k, v, g, beta, *held) and k.shape[-1] <= calls.MOST_KEYS:
        return calls.delta_rule(q, k, v, g, beta, state)
    scan = delta_rule_reference if v.shape[1] <= FEW_TOKENS else delta_rule_chunked
    return scan(q, k, v, g, beta, state)


def _heads(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q and k of length one, q over √n, once for each value head: `[b, l, H, n]`."""
    q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] != heads else x for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[b, l, H, x]` → `[chunks, b, H, c, x]`; tokens of zeros, which change nothing, fill the last one."""
    b, length, heads, size = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % chunk))
    return x.reshape(b, -1, chunk, heads, size).permute(1, 0, 3, 2, 4).contiguous()
