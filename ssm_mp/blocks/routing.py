"""Routers: which experts a token goes to, and with what weights.

Dimensions: `m` tokens, `X` experts, `c` chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssm_mp.kernels import experts as kernels

Scores = Literal["chosen_softmax", "softmax", "sigmoid"]


@dataclass(frozen=True)
class Routing:
    """From a router's logits to `top_k` experts and their weights, in float32.

    scores: a softmax over the chosen ones' logits (itera, Granite), a softmax over all (Jamba, Qwen3-Next), or sigmoids
    (Nemotron-H, LFM2).
    normalised: the chosen ones' scores are divided by their sum plus `eps`.
    corrected: chosen are the best by score plus a correction bias, which the weights do not know.
    groups, chosen_groups: only experts of the best groups are chosen; a group is as good as its two best experts.
    scaling: of the weights.
    """

    scores: Scores = "chosen_softmax"
    normalised: bool = False
    eps: float = 0.0
    corrected: bool = False
    groups: int = 1
    chosen_groups: int = 1
    scaling: float = 1.0

    def __call__(self, logits: Tensor, correction: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """`logits [m, X]` and the correction bias `[X]` → weights, and numbers of experts, `[m, c]` each."""
        logits = logits.float()
        scores = self._scores(logits)
        merit = scores if correction is None else scores + correction
        if self.chosen_groups < self.groups:
            merit = self._within_best_groups(merit)
        chosen = merit.topk(min(top_k, merit.shape[-1]), dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.scores == "chosen_softmax":
            weights = weights.softmax(dim=-1)
        if self.normalised:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.eps)
        return (weights if self.scaling == 1.0 else weights * self.scaling), chosen

    def _scores(self, logits: Tensor) -> Tensor:
        match self.scores:
            case "softmax":
                return logits.softmax(dim=-1)
            case "sigmoid":
                return logits.sigmoid()
            case "chosen_softmax":
                return logits

    def _within_best_groups(self, merit: Tensor) -> Tensor:
        """`merit [m, X]` with −∞ for experts of the other groups."""
        grouped = merit.unflatten(-1, (self.groups, -1))  # [m, groups, X / groups]
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        best = worth.topk(self.chosen_groups, dim=-1).indices
        others = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
        within: Tensor = grouped.masked_fill(others[..., None], float("-inf")).flatten(-2)
        return within

    def structure(self, experts: int, top_k: int, correction: int | None) -> kernels.Routing:
        """As the kernels take it, which choose the lower of numbers of experts that are equally good.

        correction: where the correction bias lies, float32 `[X]`.
        """
        return kernels.Routing(
            experts, min(top_k, experts), kernels.SCORES.index(self.scores), self.normalised, self.groups,
            self.chosen_groups, correction, self.eps, self.scaling,
        )  # fmt: skip
