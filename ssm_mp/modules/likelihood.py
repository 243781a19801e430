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


class Likelihood:
    """`token_nll` of logits that come as blocks of neighbouring columns, of which one at a time is held."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._log_sum: Tensor | None = None  # float64 [m]
        self._found: Tensor | float = 0.0  # the targets' logits, where their columns were there

    def add(self, logits: Tensor, first: int) -> None:
        """The logits `[m, n]` of the columns from `first` on."""
        log_sum, at = logits.logsumexp(dim=-1).double(), self._targets - first
        self._log_sum = log_sum if self._log_sum is None else torch.logaddexp(self._log_sum, log_sum)
        inside = (at >= 0) & (at < logits.shape[1])
        found = logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self._found = self._found + found.where(inside, 0.0)

    def add_scaled(self, sums: Tensor, columns: Tensor, rows: Tensor, first: int) -> None:
        """The same of logits int32 `sums [m, n]` · `columns [n]` · `rows [m, 1]`; `sums` may be spoilt."""
        self.add(sums.float().mul_(columns).mul_(rows), first)

    def nll(self) -> Tensor:
        """Of every target, once all columns are there: float64 `[m]`."""
        assert self._log_sum is not None
        return self._log_sum - self._found


def likelihood_of(targets: Tensor, *taken: Tensor) -> Likelihood | calls.LogSums:
    """What adds up likelihoods the fastest where logits are made of the tensors `taken`."""
    return calls.LogSums(targets) if calls.usable(*taken) else Likelihood(targets)


def token_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(expected ‖ logits) of each token, of logits `[m, V]`: float64 `[m]`."""
    if calls.usable(logits, expected):
        return calls.divergence(logits, expected)
    logs, target = logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(dim=-1, dtype=torch.float64)
