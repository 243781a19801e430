"""How far below the budget a map must have been measured for its certificate to be likely, from search windows alone.

Two things stand between: a chosen map is worse than it was measured (winner's curse), and a bound reaches above it.
Both are wider than single windows show where windows of one document resemble each other. How much they do is learned
from the search windows; of the certify windows it is only used how many of them each document has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.base.clustered import LEAST_CLUSTERS, correlation, worth
from search.base.confidence import reach

CURSE = 1.0
"""How much worse a chosen map is expected to be than it was measured, in its standard errors on the search windows.

The front's maps are the best of many noisy ones, and the sampler looks for more like them."""

_NEAREST = 9
"""Maps near the budget from which it is learned how much windows of one document are alike."""


@dataclass(frozen=True, eq=False)
class Certifying:
    """How a study will be certified: on so many windows, bounds wrong with a chance `error` in the first sequence.

    searched, certified: sources of the search windows and of the certify windows, None where nobody knows; alike: the
    correlation of two windows of one document.
    """

    windows: int
    error: float
    searched: np.ndarray | None = None
    certified: np.ndarray | None = None
    alike: float = 0.0


@dataclass(frozen=True)
class Expected:
    """What is expected of a map's certificate, as rises of log-perplexity.

    above: how far above the measured rise the upper bound will be; spread: how much that may be off, one sigma.
    """

    above: float
    spread: float


def expected(log_stderr: float, windows: int, certifying: Certifying) -> Expected:
    """From a map's standard error on `windows` search windows, taken to be independent."""
    single = log_stderr * math.sqrt(windows / certifying.windows)
    own = log_stderr * _design(certifying.searched, certifying.alike)
    there = single * _design(certifying.certified, certifying.alike)
    sources = certifying.certified
    clusters = 0 if sources is None else np.unique(sources).size
    if sources is not None and clusters >= LEAST_CLUSTERS:
        freedom = worth(np.unique(sources, return_counts=True)[1], certifying.alike) - 1
        above = there * reach(certifying.error, 2 * math.sqrt(6 / clusters), clusters, freedom)
    else:
        unseen = 2 * math.sqrt(6 / certifying.windows)
        above = single * reach(certifying.error, unseen, certifying.windows)
    return Expected(CURSE * own + above, math.hypot(own, there))


def _design(sources: np.ndarray | None, alike: float) -> float:
    """How many times as large as over independent windows the standard error of the mean is."""
    if sources is None:
        return 1.0
    sizes = np.unique(sources, return_counts=True)[1]
    return math.sqrt(float((sizes * (1 + alike * (sizes - 1))).sum()) / sources.size)


def alike_near(differences: Sequence[np.ndarray], sources: np.ndarray | None, budget_percent: float) -> float:
    """How much windows of one source are alike: the median over the maps nearest to the budget.

    differences: log-increases of each search window, `[w]` of each map.
    """
    if sources is None or not differences:
        return 0.0
    limit = math.log1p(budget_percent / 100)
    nearest = sorted(differences, key=lambda held: abs(float(held.mean()) - limit))[:_NEAREST]
    of = np.unique(sources, return_inverse=True)[1]
    return float(np.median([correlation(held, of) for held in nearest])) if of.max() > 0 else 0.0


def certifiable_percent(budget_percent: float, above: float) -> float:
    """The increase at which a map is as likely to be certified as not; below the budget, never below none."""
    return max(0.0, 100 * math.expm1(math.log1p(budget_percent / 100) - above))
