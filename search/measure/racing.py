"""Racing: a map is evaluated on growing rungs of windows, and stopped once it cannot be on the front.

Dimensions: `n` windows seen, `w` all search windows.

What counts is a map's mean log-increase over all `w` windows. Windows come in random order, so the `n` seen are a
sample without replacement, and the mean of all lies above

    mean − t · s/√n · √(1 − n/w)        (finite population correction; Cochran 1977, section 2.6)

with the confidence of `t`, which is widened where the differences have a long tail below (`confidence.py`). A map
is stopped where this bound is above the budget, or, for its differences from a smaller map that has seen all
windows, above zero. The error allowed to a map is divided among all its looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from search.base.confidence import reach
from ssm_mp.evaluation.evaluate import percent_of, skewness

Reason = Literal["over budget", "dominated"]

FIRST_RUNG = 16
"""Fewest windows to judge a map by: below, Student's t is no good for their skewed differences."""


@dataclass(frozen=True)
class Stop:
    """Why a map was stopped, and the lower bound of its increase over FP32 in percent on all windows."""

    reason: Reason
    lower_percent: float


def rungs(windows: int) -> tuple[int, ...]:
    """Numbers of windows after which a map is looked at, doubling; the last is all of them.

    >>> rungs(128)
    (16, 32, 64, 128)
    """
    found = []
    seen = FIRST_RUNG
    while seen < windows:
        found.append(seen)
        seen *= 2
    return (*found, windows)


def lower_bound(differences: np.ndarray, windows: int, error: float) -> float:
    """Lower confidence bound of the mean over all `windows` from the differences `[n]` of the first n."""
    n = differences.size
    spread = _standard_error(differences, n, windows)
    return float(differences.mean()) - reach(error, -skewness(differences), n) * spread


def _standard_error(differences: np.ndarray, count: int, windows: int) -> float:
    """Of the mean over `count` of `windows` that scatter as these do, drawn without replacement."""
    return float(differences.std(ddof=1)) * math.sqrt(max(0.0, 1 - count / windows) / count)


def _share(error: float, windows: int) -> float:
    """The error allowed to a map at one of two questions, at one of its looks."""
    return error / (2 * (len(rungs(windows)) - 1))


def judge(
    differences: np.ndarray, windows: int, budget_percent: float, rival: np.ndarray | None, error: float
) -> Stop | None:
    """Whether a map that has seen `n < windows` windows can be stopped.

    differences: its log-increase over FP32 on each window seen, `[n]`; rival: that of the best map which is no
    larger, on the same windows, None where there is none; error: allowed to this map in all.
    """
    share = _share(error, windows)
    bound = lower_bound(differences, windows, share)
    shown = percent_of(bound)
    if shown > budget_percent:
        return Stop("over budget", shown)
    if rival is not None and lower_bound(differences - rival, windows, share) > 0:
        return Stop("dominated", shown)
    return None


def next_rung(
    differences: np.ndarray, windows: int, budget_percent: float, rival: np.ndarray | None, error: float
) -> int:
    """The next of `rungs` at which a map that has not been stopped may well be; all windows where there is none.

    Arguments as in `judge`.
    """
    n, share = differences.size, _share(error, windows)
    questions = [(differences, math.log1p(budget_percent / 100))]
    if rival is not None:
        questions.append((differences - rival, 0.0))
    for count in (c for c in rungs(windows) if n < c < windows):
        for values, limit in questions:
            hoped = float(values.mean()) + _standard_error(values, n, windows)
            if hoped - reach(share, 0.0, count) * _standard_error(values, count, windows) > limit:
                return count
    return windows


def best_rival(bytes_: int, finished: Sequence[tuple[int, np.ndarray]]) -> np.ndarray | None:
    """Of maps with all windows (bytes, log-increases `[w]`), the best that is no larger than `bytes_`."""
    smaller = [differences for size, differences in finished if size <= bytes_]
    return min(smaller, key=lambda differences: float(differences.mean()), default=None)
