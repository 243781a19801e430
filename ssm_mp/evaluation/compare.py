"""A model beside a reference, window by window: divergence of the next token's distribution, and changed top tokens.

The reference's last hidden states are computed once; its logits are made again of them beside the model's, a few tokens
at a time, so that none are kept.

Dimensions: `w` windows, `b` windows of a shard, `L` window length, `d` model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import (
    Evaluation,
    FloatArray,
    Prefix,
    advance,
    by_window,
    head_of,
    last_hidden,
    layer_by_layer,
    passed,
    require_finite,
    scorer_of,
    start,
)
from ssm_mp.evaluation.prefix_cache import Prefixes
from ssm_mp.model import LanguageModel, Scorer
from ssm_mp.parallel import in_parallel
from ssm_mp.shards import shards


@dataclass(frozen=True, eq=False)
class Expected:
    """A reference model with its last hidden states `[w, L, d]` of all windows."""

    model: LanguageModel
    hidden: Tensor

    def at(self, numbers: np.ndarray) -> Expected:
        """Of the windows with these numbers."""
        return Expected(self.model, self.hidden[torch.from_numpy(numbers).to(self.hidden.device)])


@dataclass(frozen=True, eq=False)
class Diverged(Evaluation):
    """An evaluation that is judged by its divergence: `kl [w]`, KL(reference ‖ model) of each window in nats, summed
    over its predicted tokens."""

    kl: FloatArray

    @property
    def cost(self) -> FloatArray:
        return self.kl

    def cost_of(self, reference: Evaluation) -> FloatArray:
        """Of the reference itself, a plain evaluation, nothing."""
        return reference.kl if isinstance(reference, Diverged) else np.zeros_like(self.kl)


@dataclass(frozen=True, eq=False)
class Departure(Diverged):
    """With how many of a window's predicted tokens have another most probable token than in the reference: `[w]`."""

    changed: FloatArray


def expect(model: LanguageModel, windows: Windows, before_layer: Callable[[], None] | None = None) -> Expected:
    """The model as a reference on these windows; `before_layer` as in `evaluate`."""
    return Expected(model, advance(model, start(model, windows), len(model.layers), before_layer).hidden)


def diverge(
    model: LanguageModel,
    windows: Windows,
    expected: Expected,
    before_layer: Callable[[], None] | None = None,
    prefixes: Prefixes | None = None,
) -> Diverged:
    """`evaluate`, with the divergence from `expected` on the same windows. Raises EvaluationError as it does."""
    return diverged(*_compared(model, windows, expected, before_layer, prefixes)[:2], windows.predicted)


def depart(
    model: LanguageModel, windows: Windows, expected: Expected, before_layer: Callable[[], None] | None = None
) -> Departure:
    """The same, with the changed top tokens."""
    nll, kl, changed = _compared(model, windows, expected, before_layer, None, tops=True)
    found = diverged(nll, kl, windows.predicted)
    return Departure(found.nll, found.predicted, found.kl, changed)


def finish_diverged(model: LanguageModel, final: Prefix, windows: Windows, expected: Expected) -> Diverged:
    """`diverge` from the last hidden states alone."""
    states = shards(final.hidden, model.config)
    return diverged(*_scored(model, windows, expected, lambda s: states[s])[:2], windows.predicted)


def diverged(nll: FloatArray, kl: FloatArray, predicted: int) -> Diverged:
    """Of sums over windows `[w]`; a divergence that rounding left a hair below zero is none.

    Raises EvaluationError where one is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(kl))
    if bad.size:
        raise EvaluationError(f"the divergence from FP32 is {kl[bad[0]]} on {bad.size} of {kl.size} windows")
    found = Diverged(nll, predicted, np.maximum(kl, 0.0))
    require_finite(found)
    return found


Compared = tuple[FloatArray, FloatArray, FloatArray]
"""Likelihoods, divergences, changed top tokens of windows, sums over their tokens; `[b]` each."""


def _compared(
    model: LanguageModel,
    windows: Windows,
    expected: Expected,
    before_layer: Callable[[], None] | None,
    prefixes: Prefixes | None,
    tops: bool = False,
) -> Compared:
    every = shards(windows.ids.to(model.device), model.config)
    if model.after_layer is None:
        return _scored(model, windows, expected, lambda s: last_hidden(model, every[s], before_layer, prefixes), tops)
    states = layer_by_layer(model, every, before_layer, prefixes)
    return _scored(model, windows, expected, lambda s: states[s], tops)


def _scored(
    model: LanguageModel, windows: Windows, expected: Expected, states: Callable[[int], Tensor], tops: bool = False
) -> Compared:
    """All windows from each shard's last hidden states `[b, L, d]`."""
    ids = shards(windows.ids.to(model.device), model.config)
    theirs = shards(expected.hidden, model.config)
    score, score_reference = scorer_of(model), scorer_of(expected.model)

    def compared(s: int) -> Compared:
        columns = model.columns(ids[s][:, 1:])
        return compare_windows(score, states(s), columns, score_reference, theirs[s], tops)

    nll, kl, changed = zip(*in_parallel(compared, range(len(ids))), strict=True)
    for one in (model, expected.model):
        passed(one, head_of(one))
    return np.concatenate(nll), np.concatenate(kl), np.concatenate(changed)


def compare_windows(
    score: Scorer, hidden: Tensor, columns: Tensor, score_reference: Scorer, expected: Tensor, tops: bool = False
) -> Compared:
    """Of windows with last hidden states `[b, L, d]` here and there, and predicted tokens `columns [b, L − 1]`.

    tops: whether top tokens are compared; else none is counted as changed.
    """
    ours, theirs = (states[:, :-1].flatten(0, 1) for states in (hidden, expected))
    nll, kl = score.divergence(ours, columns.flatten(), score_reference, theirs)
    changed = score.another_top(ours, score_reference, theirs).double() if tops else torch.zeros_like(nll)
    return by_window(nll, columns), by_window(kl, columns), by_window(changed, columns)
