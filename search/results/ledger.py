"""The tries of a study's life, and the error that each may spend.

A certificate is wrong where a map is certified that truly breaks the budget. All certificates that a study ever issues
may together be wrong with a chance of `error` = 1 − confidence, so each try spends a share, whatever windows, front and
moment it belongs to. What counts is the error of a try, never 1 − error: that rounds to 1 below 1e-16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search.base.errors import StudyError

Verdict = Literal["certified", "not certified", "inconclusive"]

_BOUNDS = ("increase_percent", "lower_percent", "upper_percent")
"""Figures that may be infinite; never below −100."""


@dataclass(frozen=True)
class Try:
    """One map held against the budget. Bounds are one-sided, each with a chance of `error` to be wrong, in percent.

    `confidence` is 1 − error as far as a number near 1 can say it. Version 0.4 wrote that alone; `error` is None then.
    """

    trial: int
    verdict: Verdict
    confidence: float
    increase_percent: float
    lower_percent: float
    upper_percent: float
    budget_percent: float
    windows: int
    windows_digest: str
    error: float | None = None

    @property
    def spent(self) -> float:
        """The error that this try has spent; 0 for one of version 0.4 that could say nothing any more."""
        return 1 - self.confidence if self.error is None else self.error

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not know: None is +∞."""
        return {name: finite_or_none(value) if name in _BOUNDS else value for name, value in asdict(self).items()}


def try_from_json(values: Mapping[str, Any]) -> Try:
    """Inverse of `Try.to_json`. Raises TypeError where these are no values of a try."""
    figures: dict[str, Any] = {name: infinite_if_none(values[name]) for name in _BOUNDS if name in values}
    return Try(**{**values, **figures})


def tries_of(lines: Sequence[Any], where: str) -> list[Try]:
    """The tries that a run directory's lines hold. Raises StudyError where one is damaged."""
    try:
        return [try_from_json(line) for line in lines]
    except (TypeError, AttributeError) as error:
        raise StudyError(f"{where}: a line is no try of a certificate ({error}); restore the file") from None


def finite_or_none(value: float) -> float | None:
    """A figure in percent for JSON; None for +∞."""
    return value if math.isfinite(value) else None


def infinite_if_none(value: float | None) -> float:
    """Inverse of `finite_or_none`."""
    return math.inf if value is None else value


def error_share(number: int, error: float) -> float:
    """The part of `error` for try `number`, from 1 on: 6 / (π² number²) of it, so that all of them add up to it.

    No share vanishes, and usual studies, of 1 to 15 tries, get 96 % of all. With 512 windows Student's t, in standard
    errors, for 5 % in all, beside halving as version 0.4 did:

        try            1     2     3     5     6     11     15    50    100
        6 / (π² k²)    1.88  2.44  2.72  3.05  3.16  3.50   3.67  4.26  4.57
        1 / 2^k        1.96  2.25  2.51  2.97  3.18  4.10   4.72  8.61  none: 1 − error is 1

    A flatter sequence (k^−1.5: 2.08 at the first try, 3.30 at the 11th) would cost those most who need one try only.
    """
    return error * 6 / (math.pi * number) ** 2


def allowed_error(former: Sequence[Try], error: float) -> float:
    """The error allowed to the next try of a study, after all the tries that it has made, where `error` is for all."""
    return error_share(1 + sum(tried.error is not None for tried in former), _left_by_halving(former, error))


def _left_by_halving(former: Sequence[Try], error: float) -> float:
    """What version 0.4 left of an error.

    Try j of its ledger spent e_j / 2^j, where e_j was the error allowed in all at that moment. With m such tries and E
    the largest of all errors ever allowed, in old tries and new ones, everything together spends at most

        Σ_{j ≤ m} E / 2^j + Σ_k (E / 2^m) 6 / (π² k²)  ≤  E (1 − 2^−m) + E 2^−m  =  E.

    Tries whose confidence rounded to 1 were held to an infinite bound: they certified nothing and spent nothing.
    """
    halved = max((j for j, tried in enumerate(former, 1) if tried.error is None and tried.confidence < 1), default=0)
    return error / 2.0**halved


def error_left(former: Sequence[Try], error: float) -> float:
    """How much of `error` no try has spent yet."""
    left = _left_by_halving(former, error)
    made = sum(tried.error is not None for tried in former)
    return left * (1 - math.fsum(error_share(k, 1.0) for k in range(1, made + 1)))


def still_good(former: Sequence[Try], error: float) -> list[Try]:
    """The tries that still count where `error` is for all: those that spent no more than their place allows.

    The others were made for a smaller confidence. Those of version 0.4 that could say nothing are left out too, so
    that their maps can be tried.
    """
    good, new = [], 0
    left = _left_by_halving(former, error)
    for place, tried in enumerate(former, 1):
        if tried.error is None:
            # in the terms of version 0.4, which were rounded in this way
            if 1 - error / 2.0**place <= tried.confidence < 1:
                good.append(tried)
        else:
            new += 1
            if tried.error <= error_share(new, left):
                good.append(tried)
    return good
