"""The winner's certificate: its increase on windows that the search never saw, with a confidence bound.

The front is tried from the smallest map on, on windows that are the same or overlap from try to try, so the error
allowed in all (1 − confidence) is divided among the tries (`ledger.py`). A study keeps the list of its tries, so that
continuing it, enlarging the certify split or exporting other maps spends what is left, not the whole again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from search.base.confidence import reach
from search.base.errors import StudyError
from search.base.front import Point
from search.results.ledger import (
    Try,
    Verdict,
    allowed_error,
    error_left,
    finite_or_none,
    infinite_if_none,
    still_good,
    try_from_json,
)
from ssm_mp.evaluation.evaluate import Increase, percent_of


@dataclass(frozen=True)
class Certificate:
    """What the certify windows say: the verdict, and the figures of the try that decided it.

    `winner` is the trial that was certified, None where none was. `error_left`: what is left of 1 − confidence for
    further tries of the study; `next_error`: what the next of them may spend. None in those of version 0.4.
    """

    verdict: Verdict
    winner: int | None
    budget_percent: float
    confidence: float
    increase_percent: float
    upper_percent: float
    windows: int
    tries: tuple[Try, ...]
    error_left: float | None = None
    next_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not know: a bound of None is +∞."""
        figures = {name: finite_or_none(getattr(self, name)) for name in ("increase_percent", "upper_percent")}
        return {**asdict(self), **figures, "tries": [tried.to_json() for tried in self.tries]}


def certificate_from_json(values: Mapping[str, Any]) -> Certificate:
    """Inverse of `Certificate.to_json`."""
    figures = {name: infinite_if_none(values[name]) for name in ("increase_percent", "upper_percent")}
    return Certificate(**{**values, **figures, "tries": tuple(try_from_json(tried) for tried in values["tries"])})


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


def bounds(increase: Increase, error: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of the perplexity increase in percent, each wrong with a chance of `error`.

    Student's t, moved outwards on the side where the differences have their long tail: a few windows that lose much
    are easily missed, and the mean and the standard error are then too low together. The skewness is taken to be two
    standard errors more than was seen, for the same reason. The upper bound may be +∞, the lower one −100.
    """
    if increase.log_stderr == 0:
        return increase.percent, increase.percent
    unseen = 2 * math.sqrt(6 / increase.windows)
    below, above = (reach(error, sign * increase.skewness + unseen, increase.windows) for sign in (-1, 1))
    return (
        percent_of(increase.log_mean - below * increase.log_stderr),
        percent_of(increase.log_mean + above * increase.log_stderr),
    )


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
    error = 1 - confidence
    known = {(tried.trial, tried.windows_digest, tried.budget_percent): tried for tried in still_good(former, error)}
    ledger, tries = list(former), list[Try]()
    for point in front:
        tried = known.get((point.trial, windows_digest, budget_percent))
        if tried is None:
            tried = _try(point.trial, measure(point), allowed_error(ledger, error), budget_percent, windows_digest)
            ledger.append(tried)
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
        error_left=error_left(ledger, error),
        next_error=allowed_error(ledger, error),
    )


def _try(trial: int, increase: Increase, error: float, budget_percent: float, windows_digest: str) -> Try:
    lower, upper = bounds(increase, error)
    verdict: Verdict = "inconclusive"
    if upper < budget_percent:
        verdict = "certified"
    elif lower > budget_percent:
        verdict = "not certified"
    return Try(
        trial, verdict, 1 - error, increase.percent, lower, upper, budget_percent, increase.windows, windows_digest,
        error,
    )  # fmt: skip


def _decisive(tries: Sequence[Try]) -> Try:
    """The certified try, else the first that more windows could decide, else the last."""
    if tries[-1].verdict == "certified":
        return tries[-1]
    return next((tried for tried in tries if tried.verdict == "inconclusive"), tries[-1])
