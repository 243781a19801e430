"""The winner's certificate: its increase on windows that the search never saw, with a confidence bound.

The front is tried from the smallest map on, on windows that are the same or overlap from try to try, so the error
allowed in all (1 − confidence) is divided among the tries: half of it for the first try that a study ever makes,
a quarter for the second, and so on. A study keeps the list of its tries, so that continuing it, enlarging the
certify split or exporting other maps spends what is left, not the whole again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search.confidence import reach
from search.errors import StudyError
from search.front import Point
from ssm_mp.evaluate import Increase

Verdict = Literal["certified", "not certified", "inconclusive"]


@dataclass(frozen=True)
class Try:
    """One map held against the budget. Bounds are one-sided, each at `confidence`, in percent."""

    trial: int
    verdict: Verdict
    confidence: float
    increase_percent: float
    lower_percent: float
    upper_percent: float
    budget_percent: float
    windows: int
    windows_digest: str


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
    tries: tuple[Try, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def certificate_from_json(values: Mapping[str, Any]) -> Certificate:
    """Inverse of `Certificate.to_json`."""
    return Certificate(**{**values, "tries": tuple(Try(**tried) for tried in values["tries"])})


def standing_certificate(
    values: Mapping[str, Any] | None, front: Sequence[Point], budget_percent: float, confidence: float, where: str
) -> Certificate | None:
    """A stored certificate, where it still answers the question: same budget and confidence, winner on this front.

    Raises StudyError where what is stored is no certificate.
    """
    if values is None:
        return None
    try:
        certificate = certificate_from_json(values)
    except (KeyError, TypeError) as error:
        raise StudyError(f"{where}: not a certificate of this version ({error}); run the search again") from None
    same = (certificate.budget_percent, certificate.confidence) == (budget_percent, confidence)
    stands = certificate.winner is None or certificate.winner in {point.trial for point in front}
    return certificate if same and stands else None


def bounds(increase: Increase, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of the perplexity increase in percent, each at `confidence`.

    Student's t, moved outwards on the side where the differences have their long tail: a few windows that lose much
    are easily missed, and the mean and the standard error are then too low together. The skewness is taken to be two
    standard errors more than was seen, for the same reason.
    """
    unseen = 2 * math.sqrt(6 / increase.windows)
    below, above = (reach(confidence, sign * increase.skewness + unseen, increase.windows) for sign in (-1, 1))
    return (
        100 * math.expm1(increase.log_mean - below * increase.log_stderr),
        100 * math.expm1(increase.log_mean + above * increase.log_stderr),
    )


def error_share(number: int, error: float) -> float:
    """The error allowed to a study's try of this number (from 1); all of them together stay below `error`."""
    return error / 2.0**number


def certify(
    front: Sequence[Point],
    measure: Callable[[Point], Increase],
    *,
    budget_percent: float,
    confidence: float,
    windows_digest: str,
    former: Sequence[Try] = (),
) -> Certificate | None:
    """Try the front from its smallest map on until one is certified; None for an empty front.

    measure: a point's increase over FP32 on the certify windows, paired. former: all tries that the study has
    made; one of the same map on the same windows and budget is not made again unless more confidence is asked for
    now, and all of them raise the confidence that a new try must reach.
    """
    known = {
        (tried.trial, tried.windows_digest, tried.budget_percent): tried
        for tried in former
        if tried.confidence >= confidence
    }
    made = len(former)
    tries: list[Try] = []
    for point in front:
        tried = known.get((point.trial, windows_digest, budget_percent))
        if tried is None:
            made += 1
            needed = 1 - error_share(made, 1 - confidence)
            tried = _try(point.trial, measure(point), needed, budget_percent, windows_digest)
        tries.append(tried)
        if tried.verdict == "certified":
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
        windows=decisive.windows,
        tries=tuple(tries),
    )


def _try(trial: int, increase: Increase, confidence: float, budget_percent: float, windows_digest: str) -> Try:
    lower, upper = bounds(increase, confidence)
    verdict: Verdict = "inconclusive"
    if upper < budget_percent:
        verdict = "certified"
    elif lower > budget_percent:
        verdict = "not certified"
    return Try(
        trial, verdict, confidence, increase.percent, lower, upper, budget_percent, increase.windows, windows_digest
    )


def _decisive(tries: Sequence[Try]) -> Try:
    """The certified try, else the first that more windows could decide, else the last."""
    if tries[-1].verdict == "certified":
        return tries[-1]
    return next((tried for tried in tries if tried.verdict == "inconclusive"), tries[-1])
