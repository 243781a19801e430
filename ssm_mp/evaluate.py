"""Windows → negative log-likelihood of each, perplexity, and paired comparisons.

Dimensions: `w` windows, `b` batch, `L` window length, `d` model, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.models import LanguageModel

BATCH = 32
FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Negative log-likelihood of each window in nats, `nll [w]` float64, over `predicted` tokens a window."""

    nll: FloatArray
    predicted: int

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

    skewness: of the differences, adjusted for the number of windows (Fisher and Pearson); 0 below three windows.
    """

    log_mean: float
    log_stderr: float
    windows: int
    skewness: float = 0.0

    @property
    def percent(self) -> float:
        """Perplexity increase in percent."""
        return 100 * math.expm1(self.log_mean)

    @property
    def stderr_percent(self) -> float:
        """Its standard error in percentage points, to first order."""
        return 100 * math.exp(self.log_mean) * self.log_stderr


@dataclass(frozen=True, eq=False)
class Prefix:
    """Hidden states `[w, L, d]` of all windows at the input of layer `layer`, to evaluate from there on."""

    layer: int
    hidden: Tensor


def evaluate(
    model: LanguageModel, windows: Windows, batch: int = BATCH, before_layer: Callable[[], None] | None = None
) -> Evaluation:
    """Negative log-likelihood of every window, summed in float64. Deterministic on one machine.

    before_layer: called before each layer; what it raises ends the evaluation.
    Raises EvaluationError where a window's likelihood is NaN or infinite.

    >>> import torch
    >>> from ssm_mp import Windows, evaluate, load_model
    >>> model = load_model("studies/reference/model.safetensors")
    >>> evaluate(model, Windows(torch.arange(256).reshape(2, 128))).tokens
    254
    """
    parts = []
    with torch.inference_mode():
        for ids in windows.ids.to(_device(model)).split(batch):
            parts.append(_window_nll(model, model.hidden(ids, before_layer), ids))
    return _finite(Evaluation(np.concatenate(parts), windows.predicted))


def start(model: LanguageModel, windows: Windows, batch: int = BATCH) -> Prefix:
    """The embedded windows: the prefix of layer 0."""
    with torch.inference_mode():
        return Prefix(0, torch.cat([model.embed(ids) for ids in windows.ids.to(_device(model)).split(batch)]))


def advance(
    model: LanguageModel,
    prefix: Prefix,
    layers: int = 1,
    batch: int = BATCH,
    before_layer: Callable[[], None] | None = None,
) -> Prefix:
    """The prefix `layers` further on; `before_layer` as in `evaluate`."""
    hidden = prefix.hidden
    with torch.inference_mode():
        for layer in model.layers[prefix.layer : prefix.layer + layers]:
            if before_layer is not None:
                before_layer()
            hidden = torch.cat([layer(part) for part in hidden.split(batch)])
    return Prefix(prefix.layer + layers, hidden)


def finish(model: LanguageModel, final: Prefix, windows: Windows) -> Evaluation:
    """Evaluation from the last hidden states alone."""
    with torch.inference_mode():
        nll = _window_nll(model, final.hidden, windows.ids.to(final.hidden.device))
    return _finite(Evaluation(nll, windows.predicted))


def divergence(reference: LanguageModel, expected: Prefix, model: LanguageModel, found: Prefix) -> float:
    """Kullback–Leibler divergence KL(reference ‖ model), nats a token, from both models' last hidden states."""
    total, tokens = 0.0, 0
    step = reference.head_rows(expected.hidden.shape[1])
    with torch.inference_mode():
        for ours, theirs in zip(expected.hidden.split(step), found.hidden.split(step), strict=True):
            target = reference.scores(ours[:, :-1]).log_softmax(dim=-1)
            logs = model.scores(theirs[:, :-1]).log_softmax(dim=-1)
            total += F.kl_div(logs, target, reduction="sum", log_target=True).double().item()
            tokens += target.shape[0] * target.shape[1]
    return max(0.0, total / tokens)  # rounding can leave it a hair below zero


def require_better_than_guessing(baseline: Evaluation, vocabulary: int) -> None:
    """Raise EvaluationError where a baseline predicts no better than uniform guessing over the vocabulary."""
    if baseline.perplexity >= vocabulary:
        raise EvaluationError(
            f"the FP32 model's perplexity on this text is {baseline.perplexity:.6g}, no better than guessing uniformly "
            f"among {vocabulary} tokens; the text, the tokenizer and the checkpoint do not belong together, or the "
            "model is not trained. No precision can be judged on it"
        )


def paired_increase(candidate: Evaluation, reference: Evaluation) -> Increase:
    """Rise of log-perplexity from `reference` to `candidate`, window by window, so that common noise cancels."""
    if candidate.windows != reference.windows or candidate.predicted != reference.predicted:
        raise EvaluationError(
            f"paired comparison of {candidate.windows} windows with {reference.windows}: they are not the same"
        )
    differences = (candidate.nll - reference.nll) / candidate.predicted
    n = differences.size
    stderr = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Increase(float(differences.mean()), stderr, n, skewness(differences))


def skewness(values: FloatArray) -> float:
    """Adjusted Fisher–Pearson coefficient of `values [n]`; 0 for fewer than three, or where all are the same."""
    n = values.size
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    if n < 3 or variance == 0:
        return 0.0
    return float(np.mean(centred**3) / variance**1.5) * math.sqrt(n * (n - 1)) / (n - 2)


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


def _window_nll(model: LanguageModel, hidden: Tensor, ids: Tensor) -> FloatArray:
    """Negative log-likelihood of windows `ids [b, L]` from their last hidden states `[b, L, d]`: `[b]`."""
    sums = []
    step = model.head_rows(hidden.shape[1])
    for states, tokens in zip(hidden.split(step), ids.split(step), strict=True):
        logits = model.scores(states[:, :-1])  # [·, L − 1, V]
        nll = F.cross_entropy(logits.flatten(0, 1), model.columns(tokens[:, 1:]).flatten(), reduction="none")
        sums.append(nll.double().reshape(tokens.shape[0], -1).sum(dim=1))
    result: FloatArray = torch.cat(sums).cpu().numpy()
    return result


def _finite(evaluation: Evaluation) -> Evaluation:
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
