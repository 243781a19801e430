"""Is the file what was meant? Its weights read back and compared, then the runtime's distributions beside ours.

Dimensions: `w` windows, `l` length, `V` vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssm_mp.errors import DisagreementError, ExportError
from ssm_mp.model import LanguageModel
from ssm_mp.runtimes.exportable import Exportable, twin, with_inputs
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.running import Ran, named, run

_MOST_NUMBERS = 1 << 26
"""Log-probabilities that are compared at most: 256 MB of them."""
_SHOWN = 5
_LARGEST_NLL = 700.0
"""Nats; exp of more is no float64."""
_AMPLIFIED, _MOST_AMPLIFIED = 2.0, 1e-2
"""How many times the cost of rounding inputs two right implementations of it may be apart, and how far at most."""


@dataclass(frozen=True)
class Verdict:
    """What a runtime says of a file, beside what we say of the same numbers.

    perplexities: on the same windows, `here` by our own evaluation of the model as the file holds it. mean_kl and
    largest_kl: KL(ours ‖ runtime's) of next-token distributions, in nats. rates: tokens a second. gate: the largest
    mean KL with which it agrees.
    """

    runtime: str
    windows: int
    tokens: int
    perplexity: float
    perplexity_here: float
    mean_kl: float
    largest_kl: float
    rate: float
    rate_here: float
    gate: float
    agrees: bool

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        figures = (
            f"weights equal, perplexity {self.perplexity:.4g} against {self.perplexity_here:.4g} on {self.windows} "
            f"windows, mean KL {self.mean_kl:.1g}, largest {self.largest_kl:.1g}"
        )
        return f"{'verified by' if self.agrees else 'not confirmed by'} {self.runtime}: {figures}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


def unequal_weights(format_: Format, item: Exportable, path: Path) -> list[str]:
    """Tensors that the format's reader does not find bit for bit as the model has them; each with what differs."""
    expected, found = format_.expected(item), format_.read(path)
    problems = [f"{name}: not in the file" for name in expected if name not in found]
    problems += [f"{name}: not of the model" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        ours, theirs = expected[name](), found[name]()
        if ours.shape != theirs.shape:
            problems.append(f"{name}: {list(theirs.shape)} in the file, expected {list(ours.shape)}")
        elif not np.array_equal(ours, theirs):
            wrong, most = int((ours != theirs).sum()), float(np.abs(ours - theirs).max())
            problems.append(f"{name}: {wrong} of {ours.size} values differ, by up to {most:.2g}")
    return problems


def require_equal_weights(format_: Format, item: Exportable, path: Path) -> None:
    """Raise DisagreementError with the tensors that were not read back as they were meant."""
    problems = unequal_weights(format_, item, path)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DisagreementError(f"{path}: what was read back is not the model: {'; '.join(problems[:_SHOWN])}{more}")


def fitting(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """As many of the windows `[w, l]`, at least a part of one, as can be compared."""
    w, length = ids.shape
    most = max(2, _MOST_NUMBERS // vocabulary)
    return ids[: max(1, most // length), :most] if length * w > most else ids


def ours(model: LanguageModel, ids: np.ndarray) -> Ran:
    """Log-probabilities of our own evaluation: float32 `[w, l, V]`, window after window."""
    found = []
    with torch.inference_mode():
        model(torch.from_numpy(ids[:1, :1]).to(model.device))  # what is prepared once is no part of a rate
        began = time.perf_counter()
        for window in torch.from_numpy(ids):
            logits = model(window[None].to(model.device))[0]  # [l, V]
            found.append(torch.log_softmax(logits.float(), dim=-1).cpu().numpy())
    return Ran(np.stack(found), ids.size, time.perf_counter() - began)


def perplexity(log_probabilities: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first."""
    if ids.shape[1] < 2:
        return math.nan
    chosen = np.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], axis=2)  # [w, l-1, 1]
    nll = -float(chosen.astype(np.float64).mean())
    return math.exp(nll) if nll < _LARGEST_NLL else math.inf


def divergences(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference ‖ found) of each distribution: float64 `[w, l]`; never below 0, whatever `found` sums up to."""
    kl = np.empty(reference.shape[:2])
    for at in np.ndindex(kl.shape):  # a distribution at a time, for memory
        one, other = reference[at], found[at]
        p, difference = np.exp(one.astype(np.float64)), other.astype(np.float64) - one
        kl[at] = (p * (np.expm1(difference) - difference)).sum()  # Bregman's form: each term at least 0
    return kl


def verdict(format_: Format, item: Exportable, path: Path, ids: np.ndarray) -> Verdict:
    """Let the runtime read windows `[w, l]`, int64, and compare with our evaluation in its arithmetic.

    Raises DisagreementError where it dies or answers nonsense.
    """
    ids = fitting(ids, item.config.vocabulary)
    there = run(format_, path, ids, item.config.vocabulary)
    mine = ours(with_inputs(item, format_.inputs).model, ids)
    amplified = _AMPLIFIED * _cost_of_rounding(format_, item, ids, mine)
    gate = max(format_.largest_divergence, min(amplified, _MOST_AMPLIFIED))
    kl = divergences(mine.log_probabilities, there.log_probabilities)
    mean = float(kl.mean())
    return Verdict(
        runtime=named(format_),
        windows=ids.shape[0],
        tokens=ids.size,
        perplexity=perplexity(there.log_probabilities, ids),
        perplexity_here=perplexity(mine.log_probabilities, ids),
        mean_kl=mean,
        largest_kl=float(kl.max()),
        rate=there.tokens / max(there.seconds, 1e-9),
        rate_here=mine.tokens / max(mine.seconds, 1e-9),
        gate=gate,
        agrees=bool(mean <= gate),  # false where it is not a number
    )


def _cost_of_rounding(format_: Format, item: Exportable, ids: np.ndarray, rounded: Ran) -> float:
    """Mean KL between our evaluations with inputs rounded as the runtime does, and not rounded; 0 where it does not.

    Where layer after layer rounds, a difference in the last bit of a sum tips some roundings, and these tip others: two
    right implementations come as far apart as two such roundings, which is at most twice what one of them costs.
    """
    if format_.inputs == "none":
        return 0.0
    plain = ours(with_inputs(item, "none").model, ids)
    return float(divergences(rounded.log_probabilities, plain.log_probabilities).mean())


def twin_difference(format_: Format, item: Exportable, folder: Path, ids: np.ndarray) -> float:
    """Largest difference of log-probabilities between the runtime on a file of the float32 twin, and ours of the same.

    Raises ExportError where there can be no such file, DisagreementError where reader or runtime deny it.

    Small where only a quantised product's arithmetic is at fault; large where names or arrangement are.
    """
    whole, path = twin(item), folder / f"twin{format_.suffix}"
    refused = format_.refusal_of(whole)  # it is up to eight times as large
    if refused is not None:
        raise ExportError(f"{format_.word} holds none: {refused}")
    format_.write(whole, path)
    require_equal_weights(format_, whole, path)
    ids = fitting(ids, item.config.vocabulary)
    there, mine = (
        run(format_, path, ids, item.config.vocabulary).log_probabilities,
        ours(whole.model, ids).log_probabilities,
    )
    return float(np.abs(there - mine).max())
