"""Confidence bounds of a mean from few, skewed differences."""

from __future__ import annotations

import math

from scipy.special import stdtrit


def reach(confidence: float, skewness: float, windows: int) -> float:
    """Standard errors from the mean to a one-sided bound on the side of positive skewness; at least Student's t.

    Hall's cubic transformation of the t statistic, inverted (J. R. Statist. Soc. B 54, 1992, 221–228): a few windows
    in a long tail are easily missed, and the mean and the standard error are then too low together.
    """
    quantile = float(stdtrit(windows - 1, confidence))
    a = skewness / (3 * math.sqrt(windows))
    if a < 1e-9:  # no long tail on this side
        return quantile
    return max(quantile, (1 - math.cbrt(1 - 3 * a * (quantile + a / 2))) / a)
