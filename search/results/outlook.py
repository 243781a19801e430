"""A certificate in words: what it has cost of the error that a study may spend, and what to do next."""

from __future__ import annotations

import math

from search.base.confidence import reach
from search.results.certify import Certificate
from search.results.ledger import Try, error_share

_NEARLY_SPENT = 2.0
"""How many times as far as a study's first bounds the next must reach before hardly any error is said to be left."""


def outlook(certificate: Certificate | None) -> list[str]:
    """What is spent, and what to do; nothing where there is nothing to say."""
    return [] if certificate is None else [line for line in (spending(certificate), advice(certificate)) if line]


def spending(certificate: Certificate) -> str:
    """How much of the error is spent and left, and what the next sequence may spend; empty for one of version 0.4."""
    left, following = certificate.error_left, certificate.next_error
    if left is None or following is None:
        return ""
    allowed = 1 - certificate.confidence
    return (
        f"All sequences of maps that this study tests, whatever their windows, share an error of {_percent(allowed)}: "
        f"{_percent(allowed - left)} is spent, {_percent(left)} left. The next may spend {_percent(following)}: "
        f"its bounds reach {reach(following, 0.0, certificate.windows):.2f} standard errors, the first's reached "
        f"{_first(certificate):.2f}."
    )


def advice(certificate: Certificate) -> str:
    """What to do where the verdict is open; empty where it is not."""
    if certificate.verdict != "inconclusive":
        return ""
    wanted = _wanted(certificate)
    to = "" if wanted is None else f" to about {wanted:,}"
    more = (
        f"More windows are needed: raise `[data] certify_windows`{to} and run the search again; no trial is repeated."
    )
    if certificate.basis == "documents":
        more += (
            f" The bound is over {certificate.clusters} documents, and windows of the same ones resemble each other: "
            "a text of more documents narrows it more."
        )
    following = certificate.next_error
    if following is None or reach(following, 0.0, certificate.windows) <= _NEARLY_SPENT * _first(certificate):
        return more
    return (
        f"{more} Hardly any error is left, and other windows do not renew it. Where the text holds no more windows, "
        "begin anew on another: give `[data] text` a text that no map was tested on, and `--run-dir` a new directory. "
        "On this text a new directory would only hide the tests that were made, and its confidence would not be true."
    )


def _first(certificate: Certificate) -> float:
    """How many standard errors the bounds of a study's first sequence reach."""
    return reach(error_share(1, 1 - certificate.confidence), 0.0, certificate.windows)


def _wanted(certificate: Certificate) -> int | None:
    """How many windows would put the upper bound below the budget, if nothing else changes; None where none would."""
    decisive = next(tried for tried in reversed(certificate.tries) if tried.verdict == certificate.verdict)
    if not -100 < decisive.increase_percent < certificate.budget_percent or decisive.level == 0:
        return None
    room = math.log1p(certificate.budget_percent / 100) - math.log1p(decisive.increase_percent / 100)
    spread = math.log1p(decisive.upper_percent / 100) - math.log1p(decisive.increase_percent / 100)
    further = spread / room * _widening(certificate, decisive)
    count = decisive.windows * further * further  # a power would overflow instead of being infinite
    if not count < 1e9:
        return None
    digits = max(0, math.ceil(math.log10(count)) - 2)
    return int(math.ceil(count / 10**digits) * 10**digits)


def _widening(certificate: Certificate, decisive: Try) -> float:
    """How many times as far as that of a try the bounds of the next one reach."""
    following = certificate.next_error
    if following is None:
        return 1.0
    return reach(following, 0.0, decisive.windows) / reach(decisive.level, 0.0, decisive.windows)


def _percent(error: float) -> str:
    """An error in percent, to three digits however small it is."""
    return f"{100 * error:.3g} %"
