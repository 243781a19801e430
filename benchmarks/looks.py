"""What the certificate's benchmarks share: a study that is looked at several times, with one ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from benchmarks.synthetic import Floats, Ints
from search.base.certifiable import Certifying
from search.base.front import Point, pareto_front
from search.results.certify import Held, certify
from search.results.ledger import Entry, error_share, tries_in
from search.results.plans import plans

BUDGET_PERCENT = 5.0
CONFIDENCE = 0.95
BUDGET = math.log1p(BUDGET_PERCENT / 100)
"""The budget as a rise of log-perplexity, nats a token."""


@dataclass(frozen=True)
class Look:
    """A study at one time: how many trials it has made, and on how many certify windows it is certified."""

    trials: int
    windows: int


def points_of(sizes: Ints, log_increases: Floats, stderr: Floats | float, windows: int) -> list[Point]:
    """Trials in the given order, from their bytes and the log-increases `[m]` measured on the search windows.

    stderr: standard errors of these, `[m]` or of all; windows: how many search windows there are.
    """
    spread = np.broadcast_to(np.asarray(stderr, dtype=np.float64), log_increases.shape)
    return [
        Point(
            trial, 1 / size, int(size), math.exp(rise), 100 * math.expm1(rise), 100 * math.exp(rise) * own, {}, "",
            windows,
        )
        for trial, (size, rise, own) in enumerate(zip(sizes, log_increases, spread, strict=True))
    ]  # fmt: skip


Rule = Literal["sequence", "per map"]
"""How maps are tested: in sequences, as the project does; or each for a share of its own, as version 0.5 did."""

Measure = Callable[[Point, int], Held]
"""A point on the first so many certify windows; looks at one number of windows use the same."""


Asked = Callable[[int], Certifying]
"""How a study is certified on the first so many certify windows."""


def certifying(
    windows: int, searched: Ints | None = None, certified: Ints | None = None, alike: float = 0.0
) -> Certifying:
    """At `CONFIDENCE`, from the sources of search windows and of these certify windows where they are known."""
    return Certifying(windows, error_share(1, 1 - CONFIDENCE), searched, certified, alike)


def certified_winners(
    points: Sequence[Point],
    measure: Measure,
    looks: Sequence[Look],
    rule: Rule = "sequence",
    asked: Asked = certifying,
) -> tuple[list[int], int]:
    """Trials that the looks certified, in order, and the number of tests in the ledger at the end."""
    ledger: list[Entry] = []
    winners = []
    for look in looks:

        def measured(point: Point, count: int = look.windows) -> Held:
            return measure(point, count)

        front = pareto_front(points[: look.trials], BUDGET_PERCENT)
        if rule == "sequence":
            planned = plans(front, BUDGET_PERCENT, asked(look.windows))
        else:
            planned = [[point] for point in front]
        found = certify(
            front,
            measured,
            plans=planned,
            budget_percent=BUDGET_PERCENT,
            confidence=CONFIDENCE,
            windows_digest=str(look.windows),
            former=tuple(ledger),
            note=ledger.append,
        )
        if found is not None and found.winner is not None:
            winners.append(found.winner)
    return winners, len(tries_in(ledger))


@dataclass(frozen=True)
class Outcome:
    """One study with all its looks, against the truth.

    broken: whether any look certified a map that truly breaks the budget. chosen_breaks: whether the smallest map
    of the final front does, which is what a search without a certificate would hand out; None for an empty front.
    Losses are the bytes of the last winner over those of the smallest map truly within the budget, in percent,
    among the maps tried and among all maps; None where there is no winner or no such map.
    """

    certified: bool
    broken: bool
    chosen_breaks: bool | None
    loss_of_tried_percent: float | None
    loss_percent: float | None
    tries: int


def judge_study(
    points: Sequence[Point],
    truth: Floats,
    measure: Measure,
    looks: Sequence[Look],
    smallest: int | None = None,
    rule: Rule = "sequence",
    asked: Asked = certifying,
) -> Outcome:
    """Run all looks. truth `[m]`: true log-increases; smallest: bytes of the smallest of all maps within the budget."""
    winners, tries = certified_winners(points, measure, looks, rule, asked)
    within = [point.bytes for point in points if truth[point.trial] <= BUDGET]
    front = pareto_front(points, BUDGET_PERCENT)

    def loss(best: int | None) -> float | None:
        return 100 * (points[winners[-1]].bytes / best - 1) if winners and best else None

    return Outcome(
        certified=bool(winners),
        broken=any(bool(truth[winner] > BUDGET) for winner in winners),
        chosen_breaks=bool(truth[front[0].trial] > BUDGET) if front else None,
        loss_of_tried_percent=loss(min(within, default=None)),
        loss_percent=loss(smallest),
        tries=tries,
    )


@dataclass(frozen=True)
class Summary:
    """Many studies. Percentages are of all studies unless their name says otherwise.

    broken_at_most_percent: one-sided 95 % upper bound of Clopper and Pearson. uncertified_broken_percent: how often
    the smallest map of the front truly breaks the budget, where there is a front. Losses are medians.
    """

    studies: int
    certified_percent: float
    broken: int
    broken_percent: float
    broken_at_most_percent: float
    broken_of_certified_percent: float | None
    uncertified_broken_percent: float | None
    loss_of_tried_percent: float | None
    loss_percent: float | None
    mean_tries: float


HEADINGS = "broken ≤ 95 %   of certified  certified  loss of tried  of all  uncertified  tries"


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """The figures of many outcomes."""
    count = len(outcomes)
    certified = sum(outcome.certified for outcome in outcomes)
    broken = sum(outcome.broken for outcome in outcomes)
    chosen = [outcome.chosen_breaks for outcome in outcomes if outcome.chosen_breaks is not None]
    return Summary(
        studies=count,
        certified_percent=100 * certified / count,
        broken=broken,
        broken_percent=100 * broken / count,
        broken_at_most_percent=100 * at_most(broken, count),
        broken_of_certified_percent=100 * broken / certified if certified else None,
        uncertified_broken_percent=100 * sum(chosen) / len(chosen) if chosen else None,
        loss_of_tried_percent=_median([outcome.loss_of_tried_percent for outcome in outcomes]),
        loss_percent=_median([outcome.loss_percent for outcome in outcomes]),
        mean_tries=sum(outcome.tries for outcome in outcomes) / count,
    )


def at_most(count: int, of: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a binomial probability (Clopper and Pearson)."""
    return 1.0 if count == of else float(stats.beta.ppf(confidence, count + 1, of - count))


def row_of(summary: Summary) -> str:
    """One line under `HEADINGS`."""

    def show(value: float | None, width: int) -> str:
        return "–".rjust(width) if value is None else f"{value:{width}.2f}"

    return (
        f"{summary.broken_percent:6.2f} ≤ {summary.broken_at_most_percent:5.2f} "
        f"{show(summary.broken_of_certified_percent, 13)} {summary.certified_percent:10.1f} "
        f"{show(summary.loss_of_tried_percent, 14)} {show(summary.loss_percent, 7)} "
        f"{show(summary.uncertified_broken_percent, 12)} {summary.mean_tries:6.1f}"
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
