"""In which order a front's maps are tested, and where testing begins: from search windows alone.

Nothing here may look at certify windows: what `ledger.py` says of sequences holds for an order that was fixed without
them. Nor may it depend on what was tested before, or a continued search would not find its own sequence again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import ndtr

from search.base.certifiable import Certifying, expected
from search.base.front import Point

CHANCES = (0.99, 0.9999)
"""A sequence begins at the smallest map whose chance to pass is this; the second one where the first's start fails.

By simulation (`benchmarks.certificate`, 150 searches each, one look): with 0.99 alone 92 % of searches over 40 unequal
documents certify a map, with a second sequence 95 %; a start at 0.7 or 0.9 saves half a test and costs 0.1 % to 0.4 %
of bytes, since more first shares are lost."""


def plans(front: Sequence[Point], budget_percent: float, certifying: Certifying) -> list[list[Point]]:
    """Sequences to be tested until one of them certifies a map, each from its safest map to its smallest.

    front: on size and quality, the smallest map first. A later sequence ends before the start of the one before it,
    which has failed by then.
    """
    safest_first = list(reversed(front))
    chances = [chance(point, budget_percent, certifying) for point in safest_first]
    found: list[list[Point]] = []
    end = len(safest_first)
    for least in CHANCES:
        start = max((i for i, likely in enumerate(chances[:end]) if likely >= least), default=0)
        if start < end:
            found.append(safest_first[start:end])
        end = start
    return found


def chance(point: Point, budget_percent: float, certifying: Certifying) -> float:
    """How likely a map is certified as the first of a study, from its search windows."""
    rise = math.log1p(point.increase_percent / 100)
    own = point.stderr_percent / (100 + point.increase_percent)
    if own == 0 or point.windows == 0:  # nothing is known of its spread
        return float(point.increase_percent < budget_percent)
    found = expected(own, point.windows, certifying)
    return float(ndtr((math.log1p(budget_percent / 100) - rise - found.above) / found.spread))
