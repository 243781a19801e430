"""The winner's certificate: its increase on windows that the search never saw, with a confidence bound.

The front is tested from a map that is nearly sure to pass towards the smallest, and the last one that passes wins
(`plans.py` has the order, `ledger.py` the argument). A study keeps the ledger of its tests, so that continuing it,
enlarging the certify split or exporting other maps spends what is left, not the whole again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from search.base.clustered import LEAST_CLUSTERS, Clustered, clustered
from search.base.confidence import reach
from search.base.errors import StudyError
from search.base.front import Point
from search.results.ledger import (
    Basis,
    Entry,
    Planned,
    Try,
    Verdict,
    allowed_error,
    error_left,
    finite_or_none,
    infinite_if_none,
    shares,
    still_good,
    tries_in,
    try_from_json,
)
from ssm_mp.evaluation.evaluate import Increase, increase_of, percent_of


@dataclass(frozen=True)
class Held:
    """What the certify windows say of one map: over windows, over documents where these are known.

    stopped: it failed clearly on a part of the windows and was not held against the others. That can never certify
    a map, so it costs none of the error.
    """

    increase: Increase
    clustered: Clustered | None = None
    stopped: bool = False


def held_of(rises: np.ndarray, sources: np.ndarray | None) -> Held:
    """From the rises `[w]` of windows, nats a token, and where these come from `[w]`."""
    return Held(increase_of(rises), None if sources is None else clustered(rises, sources))


@dataclass(frozen=True)
class Certificate:
    """What the certify windows say: the verdict, and the figures of the try that decided it.

    `winner` is the trial that was certified, None where none was. `error_left`: what is left of 1 − confidence for
    further sequences of the study; `next_error`: what the next of them may spend. None in those of version 0.4.
    `basis`: what the verdict's bounds treat as independent; `clusters`: how many documents the windows come from.
    `planned`: the trials of the sequences that were begun for this front, in order; the others were not reached.
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
    basis: Basis = "windows"
    clusters: int | None = None
    planned: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not know: a bound of None is +∞."""
        figures = {name: finite_or_none(getattr(self, name)) for name in ("increase_percent", "upper_percent")}
        return {**asdict(self), **figures, "tries": [tried.to_json() for tried in self.tries]}


def certificate_from_json(values: Mapping[str, Any]) -> Certificate:
    """Inverse of `Certificate.to_json`."""
    figures = {name: infinite_if_none(values[name]) for name in ("increase_percent", "upper_percent")}
    tries = tuple(try_from_json(tried) for tried in values["tries"])
    return Certificate(**{**values, **figures, "tries": tries, "planned": tuple(values.get("planned", ()))})


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


def clustered_bounds(found: Clustered, error: float) -> tuple[float, float]:
    """The same bounds over documents: for other documents like these, not for other windows of the same ones."""
    if found.log_stderr == 0:
        return percent_of(found.log_mean), percent_of(found.log_mean)
    unseen = 2 * math.sqrt(6 / found.clusters)
    below, above = (reach(error, sign * found.skewness + unseen, found.clusters, found.freedom) for sign in (-1, 1))
    return (
        percent_of(found.log_mean - below * found.log_stderr),
        percent_of(found.log_mean + above * found.log_stderr),
    )


Note = Callable[[Entry], None]
"""Told each new line of the ledger, a sequence before its first map is evaluated; it must be kept when this returns."""


def certify(
    front: Sequence[Point],
    measure: Callable[[Point], Held],
    *,
    plans: Sequence[Sequence[Point]],
    budget_percent: float,
    confidence: float,
    windows_digest: str,
    former: Sequence[Entry] = (),
    note: Note = lambda entry: None,
) -> Certificate | None:
    """Test the plans until one of them certifies a map; None for an empty front.

    front: the smallest map first; the winner is the smallest of it that is certified, now or before. plans: sequences
    of its maps in the order of testing, chosen without a look at the certify windows. measure: what the certify windows
    say of a map. former: the study's ledger.
    """
    if not front:
        return None
    testing = _Testing(measure, budget_percent, 1 - confidence, windows_digest, list(former), note)
    planned: list[int] = []
    for plan in plans:
        planned += [point.trial for point in plan]
        testing.test(plan)
        if any(testing.passed(point) for point in plan):
            break
    tries = [tried for point in front if (tried := testing.known(point)) is not None]
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
        error_left=error_left(testing.ledger, testing.error),
        next_error=allowed_error(testing.ledger, testing.error),
        basis=decisive.basis,
        clusters=decisive.clusters,
        planned=tuple(planned),
    )


@dataclass(frozen=True)
class _Testing:
    """A study's maps held against one budget on one split; `ledger` grows."""

    measure: Callable[[Point], Held]
    budget_percent: float
    error: float
    windows_digest: str
    ledger: list[Entry]
    note: Note

    def known(self, point: Point) -> Try | None:
        """What is known of a map on these windows: that it was certified, else its try of the largest error."""
        tries = [
            tried
            for tried in tries_in(still_good(self.ledger, self.error))
            if (tried.trial, *self._asked(tried)) == (point.trial, *self._asked(self))
        ]
        return max(tries, key=lambda tried: (tried.verdict == "certified", tried.level), default=None)

    def passed(self, point: Point) -> bool:
        """Whether a map was certified."""
        tried = self.known(point)
        return tried is not None and tried.verdict == "certified"

    def test(self, plan: Sequence[Point]) -> None:
        """Go through a plan until a map is not certified. One that can certify nothing new is not begun."""
        trials = tuple(point.trial for point in plan)
        held = self._sequence(trials)
        error = allowed_error(self.ledger, self.error) if held is None else held.error
        if not self._promises(plan, error):
            return
        if held is None or len(held.plan) < len(trials):
            number = 1 + shares(self.ledger) if held is None else held.sequence
            held = Planned(number, trials, error, self.budget_percent, self.windows_digest)
            self._add(held)
        for point in plan:
            if self.passed(point):
                continue
            tried = self.known(point)
            if tried is None or tried.level < error:
                tried = self._tried(point, held)
                self._add(tried)
            if tried.verdict != "certified":
                return

    def _promises(self, plan: Sequence[Point], error: float) -> bool:
        """Whether testing a plan at a level can certify a map that is smaller than all of it that is certified."""
        smallest = min((point.bytes for point in plan if self.passed(point)), default=math.inf)
        for point in plan:
            tried = self.known(point)
            if tried is not None and tried.verdict != "certified" and tried.level >= error:
                return False  # it would fail again
            if point.bytes < smallest and (tried is None or tried.verdict != "certified"):
                return True
        return False

    def _sequence(self, trials: Sequence[int]) -> Planned | None:
        """The sequence that a plan goes on with, in its longest form; of several the one with the largest share.

        Shorter forms do not count: a map that was put behind one may have been tested, and another in its place would
        be a second chance to be wrong for one share.
        """
        longest = {
            entry.sequence: entry
            for entry in still_good(self.ledger, self.error)
            if isinstance(entry, Planned) and self._asked(entry) == self._asked(self)
        }
        found = [entry for entry in longest.values() if entry.goes_with(trials)]
        return max(found, key=lambda entry: entry.error, default=None)

    @staticmethod
    def _asked(of: Try | Planned | _Testing) -> tuple[float, str]:
        return of.budget_percent, of.windows_digest

    def _add(self, entry: Entry) -> None:
        self.note(entry)
        self.ledger.append(entry)

    def _tried(self, point: Point, sequence: Planned) -> Try:
        held, error = self.measure(point), sequence.error
        lower, upper = by_windows = bounds(held.increase, error)
        by_clusters = None if held.clustered is None else clustered_bounds(held.clustered, error)
        basis: Basis = "windows"
        if held.clustered is not None and by_clusters is not None and held.clustered.clusters >= LEAST_CLUSTERS:
            basis, (lower, upper) = "documents", by_clusters
        verdict: Verdict = "inconclusive"
        if held.stopped or lower > self.budget_percent:
            verdict = "not certified"
        elif upper < self.budget_percent:
            verdict = "certified"
        return Try(
            trial=point.trial,
            verdict=verdict,
            confidence=1 - error,
            increase_percent=held.increase.percent,
            lower_percent=lower,
            upper_percent=upper,
            budget_percent=self.budget_percent,
            windows=held.increase.windows,
            windows_digest=self.windows_digest,
            error=error,
            sequence=sequence.sequence,
            basis=basis,
            clusters=None if held.clustered is None else held.clustered.clusters,
            upper_by_windows_percent=finite_or_none(by_windows[1]),
            upper_by_documents_percent=None if by_clusters is None else finite_or_none(by_clusters[1]),
            stopped=held.stopped,
        )


def _decisive(tries: Sequence[Try]) -> Try:
    """Of tries from the smallest map on: the first that is certified, else the last that more windows could decide,
    else the last."""
    for wanted in ("certified", "inconclusive"):
        found = [tried for tried in tries if tried.verdict == wanted]
        if found:
            return found[0] if wanted == "certified" else found[-1]
    return tries[-1]
