"""Confidence bounds of a mean from few, skewed differences."""

from __future__ import annotations

import math

from scipy.special import stdtrit


def reach(error: float, skewness: float, windows: int, freedom: float | None = None) -> float:
    """Standard errors from the mean to a one-sided bound on the side of positive skewness; at least Student's t.

    error: the chance allowed to the bound to be wrong, below one half; however small, since 1 − error is not formed.
    Infinite where Student's t is beyond the largest float, or a mean of `windows` has no spread. freedom: degrees of
    freedom of the standard error, where they are not windows − 1.

    Hall's cubic transformation of the t statistic, inverted (J. R. Statist. Soc. B 54, 1992, 221–228): a few windows
    in a long tail are easily missed, and the mean and the standard error are then too low together.
    """
    freedom = windows - 1 if freedom is None else freedom
    if windows < 2 or freedom <= 0:
        return math.inf
    quantile = abs(float(stdtrit(freedom, error)))  # it is negative, but for an error of 0: +∞
    a = skewness / (3 * math.sqrt(windows))
    if a < 1e-9:  # no long tail on this side
        return quantile
    return max(quantile, (1 - math.cbrt(1 - 3 * a * (quantile + a / 2))) / a)
