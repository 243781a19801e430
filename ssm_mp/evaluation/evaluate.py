"""Windows → negative log-likelihood of each, perplexity, and paired comparisons.

Dimensions: `w` windows, `b` batch, `L` window length, `d` model, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.prefix_cache import Key, Prefixes
from ssm_mp.model import LanguageModel, Scorer
from ssm_mp.parallel import in_parallel
from ssm_mp.shards import shards

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Negative log-likelihood of each window in nats, `nll [w]` float64, over `predicted` tokens a window."""

    nll: FloatArray
    predicted: int

    @property
    def cost(self) -> FloatArray:
        """What it is judged by, of each window in nats `[w]`."""
        return self.nll

    def cost_of(self, reference: Evaluation) -> FloatArray:
        """What another evaluation of the same windows, from which this one is to be told, costs in the same sense."""
        return reference.nll

    @property
    def windows(self) -> int:
        return self.nll.size

    @property
    def tokens(self) -> int:
        """Predicted tokens of all windows."""
        return self.windows * self.predicted

    @property
    def perplexity(self) -> float:
        """exp(total negative log-likelihood ÷ predicted tokens)."""
        return math.exp(self.nll.sum() / self.tokens)


@dataclass(frozen=True)
class Increase:
    """Rise of log-perplexity over a reference on the same windows: mean and standard error of paired differences.

    Of evaluations that are judged by their divergence it is the rise of that, in nats a token as well.
    skewness: of the differences, adjusted for the number of windows (Fisher and Pearson); 0 below three windows.
    """

    log_mean: float
    log_stderr: float
    windows: int
    skewness: float = 0.0

    @property
    def percent(self) -> float:
        """Perplexity increase in percent."""
        return percent_of(self.log_mean)

    @property
    def stderr_percent(self) -> float:
        """Its standard error in percentage points, to first order."""
        if self.log_mean > 700:
            return math.inf if self.log_stderr > 0 else 0.0
        return 100 * math.exp(self.log_mean) * self.log_stderr


def percent_of(log_increase: float) -> float:
    """A rise of log-perplexity as a rise of perplexity in percent; infinite where no float can hold it."""
    return math.inf if log_increase > 700 else 100 * math.expm1(log_increase)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Hidden states `[w, L, d]` of all windows at the input of layer `layer`, to evaluate from there on."""

    layer: int
    hidden: Tensor


def evaluate(
    model: LanguageModel,
    windows: Windows,
    before_layer: Callable[[], None] | None = None,
    prefixes: Prefixes | None = None,
) -> Evaluation:
    """Negative log-likelihood of every window, summed in float64. Deterministic on one machine.

    before_layer: called before each layer; what it raises ends the evaluation. prefixes: where hidden states that
    other models share with this one are found and kept; the result is the same without.
    Raises EvaluationError where a window's likelihood is NaN or infinite.

    >>> import torch
    >>> from ssm_mp import Windows, evaluate, load_model
    >>> model = load_model("studies/reference/model.safetensors")
    >>> evaluate(model, Windows(torch.arange(256).reshape(2, 128))).tokens
    254
    """
    every = shards(windows.ids.to(model.device), model.config)
    if model.after_layer is not None:
        states = layer_by_layer(model, every, before_layer, prefixes)
        found = _nll_of(model, states, every)
        return require_finite(Evaluation(found, windows.predicted))
    score = scorer_of(model)

    def nll(ids: Tensor) -> FloatArray:
        return window_nll(model, score, last_hidden(model, ids, before_layer, prefixes), ids)

    return require_finite(Evaluation(np.concatenate(in_parallel(nll, every)), windows.predicted))


def last_hidden(
    model: LanguageModel, ids: Tensor, before_layer: Callable[[], None] | None, prefixes: Prefixes | None
) -> Tensor:
    """`model.hidden` of windows `ids [b, L]`, from the deepest layer whose input is known: `[b, L, d]`."""
    if prefixes is None:
        return model.hidden(ids, before_layer)
    keys = prefixes.keys(ids)  # of the inputs of layers 1, 2, …
    found = prefixes.cache.deepest(keys)
    first, x = (0, model.embed(ids)) if found is None else (found[0] + 1, found[1])
    new = []
    for i in range(first, len(model.layers)):
        if before_layer is not None:
            before_layer()
        x = model.layers[i](x)
        if i < len(keys):
            new.append((keys[i], x))
    prefixes.cache.keep(new)
    return x


def layer_by_layer(
    model: LanguageModel, every: Sequence[Tensor], before_layer: Callable[[], None] | None, prefixes: Prefixes | None
) -> list[Tensor]:
    """`last_hidden` of all shards `[b, L]` of windows, a layer taken by all of them before the next: `[b, L, d]` each.

    As many layers' states are kept for other models as there is room for, from the first that was computed on.
    """
    keys = [[] if prefixes is None else prefixes.keys(ids) for ids in every]
    found = [None if prefixes is None else prefixes.cache.deepest(of) for of in keys]
    first = [0 if held is None else held[0] + 1 for held in found]
    states = [None if held is None else held[1] for held in found]
    if None in states:
        embedded = in_parallel(lambda s: model.embed(every[s]) if states[s] is None else states[s], range(len(every)))
        passed(model, model.embedding)
    else:
        embedded = states
    hidden = [state for state in embedded if state is not None]
    size = sum(state.numel() * state.element_size() for state in hidden)
    room = 0 if prefixes is None else prefixes.cache.capacity // max(1, size)
    new: list[list[tuple[Key, Tensor]]] = [[] for _ in every]
    for i in range(min(first), len(model.layers)):
        hidden = _through(model.layers[i], hidden, before_layer, [i >= begin for begin in first])
        passed(model, model.layers[i])
        for s, state in enumerate(hidden):
            if i >= first[s] and i < len(keys[s]) and len(new[s]) < room:
                new[s].append((keys[s][i], state))
    if prefixes is not None:
        for states_of in new:
            prefixes.cache.keep(states_of)
    return hidden


def _through(
    layer: nn.Module, hidden: Sequence[Tensor], before_layer: Callable[[], None] | None, which: Sequence[bool]
) -> list[Tensor]:
    """Shards' states `[b, L, d]` after a layer; those that are not to take it stay as they are."""

    def onward(s: int) -> Tensor:
        if not which[s]:
            return hidden[s]
        if before_layer is not None:
            before_layer()
        found: Tensor = layer(hidden[s])
        return found

    return in_parallel(onward, range(len(hidden)))


def passed(model: LanguageModel, part: nn.Module | None) -> None:
    """Tell a model that is run layer by layer that everything has passed through a part of it."""
    if model.after_layer is not None and part is not None:
        model.after_layer(part)


def _nll_of(model: LanguageModel, states: Sequence[Tensor], every: Sequence[Tensor]) -> FloatArray:
    """Likelihoods `[w]` of shards of windows `[b, L]` from their last hidden states `[b, L, d]`."""
    score = scorer_of(model)
    pairs = list(zip(states, every, strict=True))
    parts = in_parallel(lambda pair: window_nll(model, score, *pair), pairs)
    passed(model, head_of(model))
    return np.concatenate(parts)


def head_of(model: LanguageModel) -> nn.Module:
    """The part of a model that makes logits."""
    return model.embedding if model.lm_head is None else model.lm_head


def start(model: LanguageModel, windows: Windows) -> Prefix:
    """The embedded windows: the prefix of layer 0."""
    embedded = torch.cat(in_parallel(model.embed, shards(windows.ids.to(model.device), model.config)))
    passed(model, model.embedding)
    return Prefix(0, embedded)


def advance(
    model: LanguageModel, prefix: Prefix, layers: int = 1, before_layer: Callable[[], None] | None = None
) -> Prefix:
    """The prefix `layers` further on; `before_layer` as in `evaluate`."""
    run = model.layers[prefix.layer : prefix.layer + layers]
    every = shards(prefix.hidden, model.config)
    if model.after_layer is not None:
        hidden = list(every)
        for layer in run:
            hidden = _through(layer, hidden, before_layer, [True] * len(hidden))
            passed(model, layer)
        return Prefix(prefix.layer + layers, torch.cat(hidden))

    def onward(hidden: Tensor) -> Tensor:
        for layer in run:
            if before_layer is not None:
                before_layer()
            hidden = layer(hidden)
        return hidden

    return Prefix(prefix.layer + layers, torch.cat(in_parallel(onward, every)))


def finish(model: LanguageModel, final: Prefix, windows: Windows) -> Evaluation:
    """Evaluation from the last hidden states alone."""
    ids = shards(windows.ids.to(final.hidden.device), model.config)
    return require_finite(Evaluation(_nll_of(model, shards(final.hidden, model.config), ids), windows.predicted))


def finish_against(
    reference: LanguageModel, expected: Prefix, model: LanguageModel, final: Prefix, windows: Windows
) -> tuple[Evaluation, float]:
    """`finish`, and the Kullback–Leibler divergence KL(reference ‖ model) in nats a token."""
    score, score_reference = scorer_of(model), scorer_of(reference)

    def compared(part: tuple[Tensor, Tensor, Tensor]) -> tuple[FloatArray, float]:
        """Of windows `ids [b, L]` with hidden states `[b, L, d]`: likelihoods `[b]`, and the divergences' sum."""
        *hidden, ids = part
        ours, theirs = (h[:, :-1].flatten(0, 1) for h in hidden)
        nll, kl = score.divergence(ours, model.columns(ids[:, 1:]).flatten(), score_reference, theirs)
        return by_window(nll, ids), kl.sum().item()

    ids, config = windows.ids.to(final.hidden.device), model.config
    parts = list(zip(*(shards(each, config) for each in (final.hidden, expected.hidden, ids)), strict=True))
    nll, sums = zip(*in_parallel(compared, parts), strict=True)
    for one in (model, reference):
        passed(one, head_of(one))
    evaluation = require_finite(Evaluation(np.concatenate(nll), windows.predicted))
    return evaluation, max(0.0, sum(sums) / evaluation.tokens)  # rounding can leave it a hair below zero


def require_better_than_guessing(baseline: Evaluation, vocabulary: int, unigram: float = math.inf) -> None:
    """Raise EvaluationError where `doubt` finds that a baseline does not know its text."""
    found = doubt(baseline, vocabulary, unigram)
    if found is not None:
        raise EvaluationError(found)


def doubt(baseline: Evaluation, vocabulary: int, unigram: float = math.inf) -> str | None:
    """Why a baseline does not seem to know its text, in a sentence; None where nothing is wrong with it.

    It predicts no better than uniform guessing over the vocabulary, or no better than the frequencies of tokens do:
    unigram: their perplexity on the same windows, learned from another text.
    """
    if baseline.perplexity >= vocabulary:
        return (
            f"the FP32 model's perplexity on this text is {baseline.perplexity:.6g}, no better than guessing uniformly "
            f"among {vocabulary} tokens; the text, the tokenizer and the checkpoint do not belong together, or the "
            "model is not trained. No precision can be judged on it"
        )
    if baseline.perplexity >= unigram:
        return (
            f"the FP32 model's perplexity on this text is {baseline.perplexity:.6g}, no better than that of mere token "
            f"frequencies, counted in the calibration text ({unigram:.6g}). That usually means another tokenizer than "
            "the model was trained with, token ids that are shifted, or weights read in a wrong layout (see `ssm-mp "
            "inspect`). No precision can be judged on it"
        )
    return None


def paired_increase(candidate: Evaluation, reference: Evaluation) -> Increase:
    """Rise of log-perplexity (or of what they are judged by) from `reference` to `candidate`, window by window, so that
    common noise cancels."""
    return increase_of(differences(candidate, reference))


def differences(candidate: Evaluation, reference: Evaluation) -> FloatArray:
    """The same of each window, in nats a token: `[w]`."""
    if candidate.windows != reference.windows or candidate.predicted != reference.predicted:
        raise EvaluationError(
            f"paired comparison of {candidate.windows} windows with {reference.windows}: they are not the same"
        )
    found: FloatArray = (candidate.cost - candidate.cost_of(reference)) / candidate.predicted
    return found


def increase_of(rises: FloatArray) -> Increase:
    """The mean of windows' rises `[w]`, nats a token, with its standard error."""
    n = rises.size
    stderr = float(rises.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Increase(float(rises.mean()), stderr, n, skewness(rises))


def skewness(values: FloatArray) -> float:
    """Adjusted Fisher–Pearson coefficient of `values [n]`; 0 for fewer than three, or where all are the same."""
    n = values.size
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    if n < 3 or variance < 1e-200:  # whose power of 1.5 would be 0
        return 0.0
    return float(np.mean(centred**3) / variance**1.5) * math.sqrt(n * (n - 1)) / (n - 2)


def layer_calls(model: LanguageModel, windows: Windows) -> int:
    """How often `evaluate` without prefixes, or `advance` through all layers, calls `before_layer`."""
    return len(model.layers) * len(shards(windows.ids.to(model.device), model.config))


def scorer_of(model: LanguageModel) -> Scorer:
    """A model's norm and head, for many calls."""
    with torch.inference_mode():
        return model.scorer()


def window_nll(model: LanguageModel, score: Scorer, hidden: Tensor, ids: Tensor) -> FloatArray:
    """Negative log-likelihood of windows `ids [b, L]` from their last hidden states `[b, L, d]`: `[b]`.

    score: the model's `scorer`.
    """
    return by_window(score.nll(hidden[:, :-1].flatten(0, 1), model.columns(ids[:, 1:]).flatten()), ids)


def by_window(nll: Tensor, ids: Tensor) -> FloatArray:
    """Likelihoods of tokens `[b·(L − 1)]` summed over each of the windows `ids [b, L]`: `[b]`."""
    result: FloatArray = nll.reshape(ids.shape[0], -1).sum(dim=1).cpu().numpy()
    return result


def require_finite(evaluation: Evaluation) -> Evaluation:
    """The same evaluation; raises EvaluationError where a likelihood is NaN, infinite or too large for a perplexity."""
    bad = np.flatnonzero(~np.isfinite(evaluation.nll))
    if bad.size:
        raise EvaluationError(
            f"the negative log-likelihood is {evaluation.nll[bad[0]]} on {bad.size} of {evaluation.windows} windows "
            f"(first: window {bad[0]}); a perplexity that is not finite is no result"
        )
    if evaluation.nll.sum() / evaluation.tokens > 700:  # exp would overflow
        raise EvaluationError(
            f"the mean negative log-likelihood is {evaluation.nll.sum() / evaluation.tokens:.4g} nats a token"
        )
    return evaluation
