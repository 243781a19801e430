"""The winner's certificate: its increase on windows that the search never saw, with a confidence bound.

The front is tried from the smallest map on, each try on the same certify windows, so the error allowed in all
(1 − confidence) is divided among the tries before the first is made: half of what is left for each, all of it
for the last. With a single candidate this is the plain one-sided bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy import stats

from search.front import Point
from ssm_mp.evaluate import Increase

Verdict = Literal["certified", "not certified", "inconclusive"]

MOST_TRIES = 4


@dataclass(frozen=True)
class Try:
    """One map held against the budget. Bounds are one-sided, each at `confidence`, in percent."""

    trial: int
    verdict: Verdict
    confidence: float
    increase_percent: float
    lower_percent: float
    upper_percent: float


@dataclass(frozen=True)
class Certificate:
    """What the certify windows say: the verdict, and the figures of the try that decided it.

    `winner` is the trial that was certified, None where none was.
    """

    verdict: Verdict
    winner: int | None
    budget_percent: float
    confidence: float
    increase_percent: float
    upper_percent: float
    windows: int
    windows_digest: str
    tries: tuple[Try, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def certificate_from_json(values: Mapping[str, Any]) -> Certificate:
    """Inverse of `Certificate.to_json`."""
    return Certificate(**{**values, "tries": tuple(Try(**tried) for tried in values["tries"])})


def bounds(increase: Increase, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of the perplexity increase in percent, each at `confidence` (Student's t)."""
    reach = float(stats.t.ppf(confidence, increase.windows - 1)) * increase.log_stderr
    return 100 * math.expm1(increase.log_mean - reach), 100 * math.expm1(increase.log_mean + reach)


def error_shares(tries: int, error: float) -> list[float]:
    """The error allowed to each of `tries` tries; they sum to `error`."""
    shares = [error / 2 ** (i + 1) for i in range(tries)]
    if shares:
        shares[-1] *= 2
    return shares


def certify(
    front: Sequence[Point],
    measure: Callable[[Point], Increase],
    *,
    budget_percent: float,
    confidence: float,
    windows_digest: str,
    most_tries: int = MOST_TRIES,
) -> Certificate | None:
    """Try the front from its smallest map on until one is certified; None for an empty front.

    measure: a point's increase over FP32 on the certify windows, paired.
    """
    candidates = list(front[:most_tries])
    tries: list[Try] = []
    windows = 0
    for point, error in zip(candidates, error_shares(len(candidates), 1 - confidence), strict=True):
        increase = measure(point)
        windows = increase.windows
        tries.append(_try(point.trial, increase, 1 - error, budget_percent))
        if tries[-1].verdict == "certified":
            break
    if not tries:
        return None
    decisive = _decisive(tries)
    return Certificate(
        verdict=decisive.verdict,
        winner=decisive.trial if decisive.verdict == "certified" else None,
        budget_percent=budget_percent,
        confidence=confidence,
        increase_percent=decisive.increase_percent,
        upper_percent=decisive.upper_percent,
        windows=windows,
        windows_digest=windows_digest,
        tries=tuple(tries),
    )


def _try(trial: int, increase: Increase, confidence: float, budget_percent: float) -> Try:
    lower, upper = bounds(increase, confidence)
    verdict: Verdict = "inconclusive"
    if upper < budget_percent:
        verdict = "certified"
    elif lower > budget_percent:
        verdict = "not certified"
    return Try(trial, verdict, confidence, increase.percent, lower, upper)


def _decisive(tries: Sequence[Try]) -> Try:
    """The certified try, else the first that more windows could decide, else the last."""
    if tries[-1].verdict == "certified":
        return tries[-1]
    return next((tried for tried in tries if tried.verdict == "inconclusive"), tries[-1])
