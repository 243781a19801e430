"""How far below the budget a map must have been measured for its certificate to be likely, from search windows alone.

Two things stand between: a chosen map is worse than it was measured (winner's curse), and a bound reaches above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import stdtrit

CURSE = 1.0
"""How much worse a chosen map is expected to be than it was measured, in its standard errors on the search windows.

The front's maps are the best of many noisy ones, and the sampler looks for more like them."""

WIDENING = 1.35
"""How much wider the bound over documents is expected to be than the one over windows."""


@dataclass(frozen=True)
class Certifying:
    """How a study will be certified: on so many windows, bounds wrong with a chance `error` in the first sequence."""

    windows: int
    error: float


@dataclass(frozen=True)
class Expected:
    """What is expected of a map's certificate, as rises of log-perplexity.

    above: how far above the measured rise the upper bound will be; spread: how much that may be off, one sigma.
    """

    above: float
    spread: float


def expected(log_stderr: float, windows: int, certifying: Certifying) -> Expected:
    """From a map's standard error on `windows` search windows, at least two certify windows."""
    there = WIDENING * log_stderr * math.sqrt(windows / certifying.windows)
    quantile = abs(float(stdtrit(max(1, certifying.windows - 1), certifying.error)))
    return Expected(CURSE * log_stderr + quantile * there, math.hypot(log_stderr, there))


def certifiable_percent(budget_percent: float, above: float) -> float:
    """The increase at which a map is as likely to be certified as not; below the budget, never below none."""
    return max(0.0, 100 * math.expm1(math.log1p(budget_percent / 100) - above))
