"""Does the error of a converted model grow with its state? Perplexity increase by position in the window.

A state that is rounded at every step, or computed by rounded weights, carries its error along. If errors pile up, the
increase over FP32 is larger at the end of a window than at its beginning, and larger still in windows longer than the
model was trained on.

Dimensions: `w` windows, `L` window length, `b` batch, `m` tokens. Positions count from 0; a window predicts its tokens
at positions 1 … L−1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_mp.config import Config
from ssm_mp.data import Windows
from ssm_mp.errors import DataError, EvaluationError
from ssm_mp.evaluation.evaluate import Evaluation, Increase, paired_increase
from ssm_mp.model import LanguageModel
from ssm_mp.parallel import in_parallel
from ssm_mp.shards import shards

LONG = 4
"""Long windows are so many times as long as those of training."""

_LARGEST = 700.0
"""A mean negative log-likelihood beyond it has no perplexity: exp overflows."""

Losses = np.ndarray[tuple[int, int], np.dtype[np.float64]]
"""Negative log-likelihood of every predicted token, `[w, L − 1]`, nats."""


@dataclass(frozen=True)
class Bucket:
    """The predicted tokens at positions `first` … `last`, both included, of all windows."""

    first: int
    last: int
    increase: Increase
    fp32_perplexity: float


@dataclass(frozen=True, eq=False)
class Drift:
    """Perplexity increase of a model over FP32, over all positions and by position.

    growth: rise of the increase from a window's first predicted token to its last, by the straight line of least
    squares through each window's differences; mean and standard error over windows.
    """

    fp32: Evaluation
    whole: Increase
    growth: Increase
    buckets: tuple[Bucket, ...]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.fp32.predicted + 1

    @property
    def grows(self) -> bool:
        """Whether the growth is more than two standard errors above zero."""
        return self.growth.log_mean > 2 * self.growth.log_stderr

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, increases in percent."""
        return {
            "length": self.length,
            "windows": self.fp32.windows,
            "fp32_perplexity": self.fp32.perplexity,
            **_percent("increase", self.whole),
            **_percent("growth", self.growth),
            "grows": self.grows,
            "buckets": [
                {
                    "first": bucket.first,
                    "last": bucket.last,
                    "fp32_perplexity": bucket.fp32_perplexity,
                    **_percent("increase", bucket.increase),
                }
                for bucket in self.buckets
            ],
        }


def drift(
    model: LanguageModel,
    fp32: LanguageModel,
    windows: Windows,
    buckets: int = 8,
    step: Callable[[], None] = lambda: None,
) -> Drift:
    """Increase of `model` over `fp32` on the same windows, in at most `buckets` buckets of neighbouring positions.

    step: called after each of `drift_steps`.

    Raises DataError where the windows are longer than a model's positions or training, or where there are fewer than
    two of them; EvaluationError where a likelihood is NaN or infinite.

    >>> import torch
    >>> from ssm_mp import Windows, drift, load_model
    >>> model = load_model("studies/reference/model.safetensors")
    >>> drift(model, model, Windows(torch.arange(256).reshape(4, 64)), buckets=2).whole.percent
    0.0
    """
    for one in (model, fp32):
        reason = too_long(one.config, windows.length)
        if reason is not None:
            raise DataError(reason)
    if len(windows) < 2 or windows.length < 2 or buckets < 1:
        raise DataError(
            f"drift of {len(windows)} windows of {windows.length} tokens in {buckets} buckets: expected at least two "
            "windows of two tokens, and one bucket"
        )
    return drift_of(token_losses(model, windows, step), token_losses(fp32, windows, step), buckets)


def drift_steps(model: LanguageModel, windows: Windows) -> int:
    """How often `drift` calls `step`."""
    return 2 * len(shards(windows.ids, model.config))


def too_long(config: Config, length: int) -> str | None:
    """Why a model cannot, or should not, read windows of `length` tokens; None where it can."""
    if config.max_tokens is None or length <= config.max_tokens:
        return None
    if config.position_table is None:
        return f"{config.limit}, so windows of {length} would measure that and not its state"
    return f"the model's positions end at {config.max_tokens} tokens, so it cannot read windows of {length}"


def token_losses(model: LanguageModel, windows: Windows, step: Callable[[], None] = lambda: None) -> Losses:
    """Negative log-likelihood of every predicted token; `step` is called after each shard of windows.

    Raises EvaluationError where one is NaN or infinite.
    """
    with torch.inference_mode():
        score = model.scorer()

    def losses(ids: Tensor) -> Losses:
        """Of windows `ids [b, L]`: `[b, L − 1]`."""
        nll = score.nll(model.hidden(ids)[:, :-1].flatten(0, 1), model.columns(ids[:, 1:]).flatten())
        found: Losses = nll.reshape(ids.shape[0], -1).cpu().numpy()
        step()
        return found

    ids = windows.ids.to(model.device)
    found = np.concatenate(in_parallel(losses, shards(ids, model.config)))
    bad = np.argwhere(~np.isfinite(found))
    if bad.size:
        window, at = bad[0]
        raise EvaluationError(
            f"the negative log-likelihood is {found[window, at]} at {len(bad)} of {found.size} tokens (first: window "
            f"{window}, position {at + 1})"
        )
    return found


def drift_of(model: Losses, fp32: Losses, buckets: int) -> Drift:
    """The drift of two models' losses of the same tokens, `[w, L − 1]` each."""
    positions = np.arange(1, fp32.shape[1] + 1)
    parts = np.array_split(np.arange(positions.size), min(buckets, positions.size))
    return Drift(
        fp32=_evaluation(fp32),
        whole=paired_increase(_evaluation(model), _evaluation(fp32)),
        growth=_growth(model - fp32),
        buckets=tuple(_bucket(model[:, part], fp32[:, part], positions[part]) for part in parts),
    )


def _bucket(model: Losses, fp32: Losses, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Bucket:
    ours, theirs = _evaluation(model), _evaluation(fp32)
    return Bucket(int(positions[0]), int(positions[-1]), paired_increase(ours, theirs), theirs.perplexity)


def _evaluation(losses: Losses) -> Evaluation:
    """The losses summed window by window. Raises EvaluationError where their perplexity overflows."""
    if losses.mean() > _LARGEST:
        raise EvaluationError(f"the mean negative log-likelihood is {losses.mean():.4g} nats a token")
    return Evaluation(losses.sum(axis=1), losses.shape[1])


def _growth(differences: Losses) -> Increase:
    """Least-squares rise of each window's differences from its first position to its last: mean, standard error."""
    count, length = differences.shape
    if length < 2:
        return Increase(0.0, 0.0, count)
    centred = np.arange(length) - (length - 1) / 2
    rises = differences @ centred / (centred @ centred) * (length - 1)
    return Increase(float(rises.mean()), float(rises.std(ddof=1)) / math.sqrt(count), count)


def _percent(name: str, increase: Increase) -> dict[str, float]:
    key = "stderr_percent" if name == "increase" else f"{name}_stderr_percent"
    return {f"{name}_percent": increase.percent, key: increase.stderr_percent}
