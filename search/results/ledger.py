"""What a study has tested of its maps over its life, and the error that it may spend on that.

A certificate is wrong where a map is certified that truly breaks the budget. All certificates that a study ever issues
may together be wrong with a chance of `error` = 1 − confidence. What spends a share of it is a *sequence*: a list of
maps, from the safest to the smallest, each tested only after all before it have been certified, and each at the whole
share of the sequence (fixed-sequence testing; Learn then Test, Angelopoulos et al. 2021).

Why that holds. In a sequence that was fixed beforehand let M be the first map that truly breaks the budget. Whatever
else happens, the sequence certifies a wrong map only if it certifies M, which is a single test: a chance of the
sequence's share. Sequences add up to at most the sum of their shares (union bound), whatever windows they look at.

What is the same sequence again, and so spends nothing:

- The same maps in the same order, held against the same budget on the same windows. Its tests come out as before.
- One that begins with all maps of a former one, or that a former one begins with. The order is a function of the
  search windows alone (`plans.py`), so whether and how it goes on was decided without looking at certify windows, and
  M is the same map in both; stopping in between, at any moment, only leaves tests out. What a sequence has grown to
  is all of it from then on: two that part behind the maps of a shorter form are two, each with an M of its own.
- One that was interrupted: its maps are noted *before* the first is evaluated, so that whoever goes on finds it. Noted
  afterwards, a crash could hide a test, and another order could be chosen with knowledge of its outcome.

Anything else is another sequence with a share of its own: more trials that change the front before its end, a larger
split, `--pick` (a sequence of one map). A map that was certified before, in any sequence, passes without a test: if
that was wrong, the error was counted there. A sequence that could certify nothing new is not begun and spends nothing.

What counts is an error, never 1 − error: that rounds to 1 below 1e-16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search.base.errors import StudyError

Verdict = Literal["certified", "not certified", "inconclusive"]

Basis = Literal["windows", "documents"]
"""What a verdict's bounds treat as independent."""

_BOUNDS = ("increase_percent", "lower_percent", "upper_percent")
"""Figures that may be infinite; never below −100."""


@dataclass(frozen=True)
class Try:
    """One map held against the budget. Bounds are one-sided, each with a chance of `error` to be wrong, in percent.

    `confidence` is 1 − error as far as a number near 1 can say it. Version 0.4 wrote that alone; `error` is None then.
    sequence: the number of the one that this belongs to; None where the try spent a share of its own, as version 0.5
    and before did. basis: which bounds are these; clusters: documents that the windows come from, None where nobody
    knows. upper_by_windows_percent, upper_by_documents_percent: both upper bounds; None where there is none or it
    is +∞. stopped: it failed clearly on the first `windows` windows and saw no more.
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
    sequence: int | None = None
    basis: Basis = "windows"
    clusters: int | None = None
    upper_by_windows_percent: float | None = None
    upper_by_documents_percent: float | None = None
    stopped: bool = False

    @property
    def level(self) -> float:
        """The chance of each of its bounds to be wrong; 0 for one of version 0.4 that could say nothing any more."""
        return 1 - self.confidence if self.error is None else self.error

    @property
    def spent(self) -> float:
        """The error that this try has spent by itself: none where its sequence did."""
        return 0.0 if self.sequence is not None else self.level

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not know: None is +∞."""
        return {name: finite_or_none(value) if name in _BOUNDS else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Planned:
    """A sequence, as it is noted before its first map is evaluated: trials `plan`, the safest first.

    sequence: its number among all that spent a share of the study's error, from 1 on; error: that share. A later line
    of the same number has more maps behind the same ones.
    """

    sequence: int
    plan: tuple[int, ...]
    error: float
    budget_percent: float
    windows_digest: str

    @property
    def spent(self) -> float:
        """The error that the sequence spends, however many of its maps are tested."""
        return self.error

    def goes_with(self, trials: Sequence[int]) -> bool:
        """Whether this and a list of trials are the same as far as both go."""
        return all(mine == theirs for mine, theirs in zip(self.plan, trials, strict=False))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Entry = Try | Planned
"""A line of the ledger."""


def try_from_json(values: Mapping[str, Any]) -> Try:
    """Inverse of `Try.to_json`. Raises TypeError where these are no values of a try."""
    figures: dict[str, Any] = {name: infinite_if_none(values[name]) for name in _BOUNDS if name in values}
    return Try(**{**values, **figures})


def entries_of(lines: Sequence[Any], where: str) -> list[Entry]:
    """The ledger that a run directory's lines hold. Raises StudyError where one is damaged."""
    try:
        return [
            Planned(**{**line, "plan": tuple(line["plan"])}) if "plan" in line else try_from_json(line)
            for line in lines
        ]
    except (TypeError, AttributeError) as error:
        raise StudyError(f"{where}: a line is no try of a certificate ({error}); restore the file") from None


def tries_in(entries: Sequence[Entry]) -> list[Try]:
    """The tries of a ledger."""
    return [entry for entry in entries if isinstance(entry, Try)]


def finite_or_none(value: float) -> float | None:
    """A figure in percent for JSON; None for +∞."""
    return value if math.isfinite(value) else None


def infinite_if_none(value: float | None) -> float:
    """Inverse of `finite_or_none`."""
    return math.inf if value is None else value


def error_share(number: int, error: float) -> float:
    """The part of `error` for sequence `number`, from 1 on: 6 / (π² number²) of it, so that all of them add up to it.

    No share vanishes, and usual studies, of 1 to 3 sequences, get 83 % of all. With 512 windows Student's t, in
    standard errors, for 5 % in all, beside halving as version 0.4 did for every map:

        number         1     2     3     5     6     11     15    50    100
        6 / (π² k²)    1.88  2.44  2.72  3.05  3.16  3.50   3.67  4.26  4.57
        1 / 2^k        1.96  2.25  2.51  2.97  3.18  4.10   4.72  8.61  none: 1 − error is 1

    A flatter series (k^−1.5: 2.08 at the first, 3.30 at the 11th) would cost those most who need one sequence only.
    """
    return error * 6 / (math.pi * number) ** 2


def shares(former: Sequence[Entry]) -> int:
    """How many shares of its error a study has spent, beside those of version 0.4: sequences, and single tries."""
    numbers = {entry.sequence for entry in former if isinstance(entry, Planned)}
    return len(numbers) + sum(_alone(entry) for entry in former)


def _alone(entry: Entry) -> bool:
    """Whether a line is a try of version 0.5, which spent a share by itself."""
    return isinstance(entry, Try) and entry.error is not None and entry.sequence is None


def allowed_error(former: Sequence[Entry], error: float) -> float:
    """The error allowed to the next sequence of a study, after all that it has tested, where `error` is for all."""
    return error_share(1 + shares(former), _left_by_halving(former, error))


def _left_by_halving(former: Sequence[Entry], error: float) -> float:
    """What version 0.4 left of an error.

    Try j of its ledger spent e_j / 2^j, where e_j was the error allowed in all at that moment. With m such tries and E
    the largest of all errors ever allowed, everything together spends at most

        Σ_{j ≤ m} E / 2^j + Σ_k (E / 2^m) 6 / (π² k²)  ≤  E (1 − 2^−m) + E 2^−m  =  E.

    Tries whose confidence rounded to 1 were held to an infinite bound: they certified nothing and spent nothing.
    """
    old = ((j, entry) for j, entry in enumerate(former, 1) if isinstance(entry, Try) and entry.error is None)
    halved = max((j for j, tried in old if tried.confidence < 1), default=0)
    return error / 2.0**halved


def error_left(former: Sequence[Entry], error: float) -> float:
    """How much of `error` nothing has spent yet."""
    left = _left_by_halving(former, error)
    return left * (1 - math.fsum(error_share(k, 1.0) for k in range(1, shares(former) + 1)))


def still_good(former: Sequence[Entry], error: float) -> list[Entry]:
    """The lines that still count where `error` is for all: those that spent no more than their place allows.

    The others were made for a smaller confidence, or belong to a sequence that was. Tries of version 0.4 that could
    say nothing are left out too, so that their maps can be tried.
    """
    good: list[Entry] = []
    left, seen, counted = _left_by_halving(former, error), 0, dict[int, bool]()
    for place, entry in enumerate(former, 1):
        if isinstance(entry, Planned):
            if entry.sequence not in counted:
                seen += 1
                counted[entry.sequence] = entry.error <= error_share(seen, left)
            keep = counted[entry.sequence]
        elif entry.error is None:
            # in the terms of version 0.4, which were rounded in this way
            keep = 1 - error / 2.0**place <= entry.confidence < 1
        elif entry.sequence is None:
            seen += 1
            keep = entry.error <= error_share(seen, left)
        else:
            keep = counted.get(entry.sequence, False)
        if keep:
            good.append(entry)
    return good
