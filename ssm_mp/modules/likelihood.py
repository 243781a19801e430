"""From logits to likelihoods: each row of logits is read once or twice, and nothing as large is written.

Dimensions: `m` tokens, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.kernels import calls
from ssm_mp.kernels.chosen import kernels_for


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of `targets [m]` under `logits [m, V]`: float64 `[m]`."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.negative_log_likelihood(logits, targets)
    return F.cross_entropy(logits, targets, reduction="none").double()


def token_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(expected ‖ logits) of each token, of logits `[m, V]`: float64 `[m]`."""
    if calls.usable(logits, expected):
        return calls.divergence(logits, expected)
    logs, target = logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(dim=-1, dtype=torch.float64)
