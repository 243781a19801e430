"""Sequences of tests over a study's life, whatever is tested when: each property that the argument stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.base.clustered import LEAST_CLUSTERS, Clustered
from search.base.front import Point
from search.results.certify import Certificate, Held, Note, bounds, certify, clustered_bounds
from search.results.ledger import Entry, Planned, Try, error_left, tries_in
from search.results.outlook import outlook
from search.results.tested import basis, order, rows_of
from ssm_mp.evaluation.evaluate import Increase
from tests.search.base.test_front import point

FRONT = [point(i, 100 + i, 4.0 - i / 2) for i in range(8)]
"""The smallest map first."""
PASS, FAIL = Increase(0.0, 0.001, 100), Increase(0.08, 0.001, 100)


def against(
    plans: Sequence[Sequence[Point]],
    passes: Callable[[int], bool],
    former: Sequence[Entry] = (),
    note: Note = lambda entry: None,
    digest: str = "x",
    confidence: float = 0.95,
    seen: list[int] | None = None,
) -> Certificate | None:
    def measure(chosen: Point) -> Held:
        if seen is not None:
            seen.append(chosen.trial)
        return Held(PASS if passes(chosen.trial) else FAIL)

    return certify(
        FRONT, measure, plans=plans, budget_percent=5, confidence=confidence, windows_digest=digest, former=former,
        note=note,
    )  # fmt: skip


SETS = st.sets(st.integers(0, 7))
STARTS = st.integers(1, 8)


@given(SETS, STARTS)
def test_a_sequence_stops_at_the_first_map_that_is_not_certified(passing: set[int], start: int) -> None:
    plan, seen, ledger = FRONT[:start][::-1], list[int](), list[Entry]()
    found = against([plan], passing.__contains__, seen=seen, note=ledger.append)
    trials = [chosen.trial for chosen in plan]
    failed = next((i for i, trial in enumerate(trials) if trial not in passing), len(trials))
    assert seen == trials[: failed + 1]
    assert found is not None
    assert found.winner == (trials[failed - 1] if failed else None)
    assert len({tried.error for tried in tries_in(ledger)}) == 1


@given(SETS, STARTS)
def test_the_maps_of_a_sequence_are_noted_before_the_first_is_evaluated(passing: set[int], start: int) -> None:
    happened: list[object] = []

    def measure(chosen: Point) -> Held:
        happened.append(chosen.trial)
        return Held(PASS if chosen.trial in passing else FAIL)

    plan = FRONT[:start][::-1]
    certify(FRONT, measure, plans=[plan], budget_percent=5, confidence=0.95, windows_digest="x", note=happened.append)
    assert isinstance(happened[0], Planned)
    assert happened[0].plan == tuple(range(start))[::-1]
    assert [type(one) for one in happened[1:]] == [int, Try] * ((len(happened) - 1) // 2)  # and each try at once


@given(SETS, STARTS, st.integers(0, 20))
def test_an_interrupted_sequence_goes_on_and_ends_as_if_it_had_not_been(
    passing: set[int], start: int, lines: int
) -> None:
    plans = [FRONT[:start][::-1], FRONT[start:][::-1]]
    whole: list[Entry] = []
    expected = against(plans, passing.__contains__, note=whole.append)
    ledger = whole[:lines]
    seen: list[int] = []
    assert against(plans, passing.__contains__, former=tuple(ledger), note=ledger.append, seen=seen) == expected
    assert ledger == whole
    assert not {tried.trial for tried in tries_in(whole[:lines])} & set(seen)


class DiesError(Exception):
    pass


def test_a_process_that_dies_at_its_first_map_leaves_the_plan_and_spends_no_second_share() -> None:
    ledger: list[Entry] = []

    def dies(chosen: Point) -> Held:
        raise DiesError

    with pytest.raises(DiesError):
        certify(
            FRONT, dies, plans=[FRONT[::-1]], budget_percent=5, confidence=0.95, windows_digest="x", note=ledger.append
        )
    assert [entry.spent > 0 for entry in ledger] == [True]
    against([FRONT[::-1]], lambda _: True, former=tuple(ledger), note=ledger.append)
    assert {tried.sequence for tried in tries_in(ledger)} == {1}
    assert sum(isinstance(entry, Planned) for entry in ledger) == 1


MOVES = st.tuples(
    st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), SETS, st.sampled_from("ab"),
    st.sampled_from([0.9, 0.95, 0.99]),
)  # fmt: skip
"""A list of maps, those that pass, the windows, the confidence: whatever a study may be asked next."""


@settings(deadline=None)
@given(st.lists(MOVES, max_size=12))
def test_over_any_life_of_a_study_less_than_the_error_is_spent(
    moves: list[tuple[list[int], set[int], str, float]],
) -> None:
    ledger: list[Entry] = []
    for trials, passing, digest, confidence in moves:
        plan = [FRONT[trial] for trial in trials]
        against(
            [plan], passing.__contains__, former=tuple(ledger), note=ledger.append, digest=digest, confidence=confidence
        )
    spent = {entry.sequence: Fraction(entry.error) for entry in ledger if isinstance(entry, Planned)}
    largest = max((1 - confidence for *_, confidence in moves), default=0.0)
    assert sum(spent.values()) <= Fraction(largest)
    assert all(tried.level == float(spent[tried.sequence or 0]) for tried in tries_in(ledger))
    assert sum(tried.spent for tried in tries_in(ledger)) == 0


@given(SETS, STARTS, st.integers(0, 8))
def test_the_same_maps_again_or_more_behind_them_are_the_same_sequence(
    passing: set[int], start: int, further: int
) -> None:
    plan, ledger = FRONT[::-1], list[Entry]()
    against([plan[:start]], passing.__contains__, note=ledger.append)
    left = error_left(ledger, 0.05)
    for longer in (start, min(8, start + further), start):
        against([plan[:longer]], passing.__contains__, former=tuple(ledger), note=ledger.append)
    assert error_left(ledger, 0.05) == left
    assert {entry.sequence for entry in ledger} == {1}


@pytest.mark.parametrize("passing", [{3}, {3, 2}, {3, 2, 1}])
def test_in_every_life_of_three_moves_a_sequence_only_grows_at_its_end(passing: set[int]) -> None:
    for moves in product([(3,), (3, 2), (3, 1), (3, 2, 1)], repeat=3):
        ledger: list[Entry] = []
        for trials in moves:
            plan = [FRONT[trial] for trial in trials]
            against([plan], passing.__contains__, former=tuple(ledger), note=ledger.append)
        for former, later in combinations([entry for entry in ledger if isinstance(entry, Planned)], 2):
            if former.sequence == later.sequence:
                assert later.plan[: len(former.plan)] == former.plan


def test_a_sequence_that_has_grown_is_another_than_one_that_grows_elsewhere() -> None:
    ledger: list[Entry] = []
    for trials in ((3,), (3, 2), (3, 1)):  # 2 is tested and fails, then 1 stands in its place
        plan = [FRONT[trial] for trial in trials]
        against([plan], lambda trial: trial == 3, former=tuple(ledger), note=ledger.append)
    assert [tried.sequence for tried in tries_in(ledger)] == [1, 1, 2]


def test_another_order_other_windows_and_a_picked_map_are_sequences_of_their_own() -> None:
    ledger: list[Entry] = []
    for plan, digest in ((FRONT[3::-1], "x"), ([FRONT[5], FRONT[2]], "x"), (FRONT[3::-1], "y"), ([FRONT[7]], "y")):
        against([plan], lambda trial: trial == 3, former=tuple(ledger), note=ledger.append, digest=digest)
    assert sorted({entry.sequence or 0 for entry in ledger}) == [1, 2, 3, 4]


def test_a_sequence_that_can_certify_nothing_new_is_not_begun() -> None:
    ledger: list[Entry] = []
    against([FRONT[3::-1]], lambda trial: trial != 1, note=ledger.append)
    before = list(ledger)
    # 1 has failed at a larger share: it would again, so what stands behind it cannot be reached
    found = against([[FRONT[3], FRONT[2], FRONT[1], FRONT[0]][1:]], lambda _: True, tuple(ledger), ledger.append)
    assert ledger == before
    assert found is not None
    assert found.winner == 2


def test_the_second_plan_is_tested_only_where_the_first_certifies_nothing() -> None:
    for first_passes in (True, False):
        ledger: list[Entry] = []
        plans = [FRONT[2::-1], FRONT[:2:-1]]
        found = against(plans, lambda trial, ok=first_passes: trial > 2 or ok, note=ledger.append)  # type: ignore[misc]
        assert found is not None
        assert found.winner == (0 if first_passes else 3)
        assert {entry.sequence for entry in ledger} == ({1} if first_passes else {1, 2})
        assert "Tested from the map" in order(found)


def alone(trial: int, error: float, verdict: Any = "not certified") -> Try:
    """A try of version 0.5."""
    return Try(trial, verdict, 1 - error, 6.0, 5.5, 6.5, 5.0, 100, "x", error)


def test_a_certificate_of_version_0_5_stands_and_its_tries_count() -> None:
    from search.results.ledger import error_share

    former = [alone(0, error_share(1, 0.05)), alone(1, error_share(2, 0.05), "certified")]
    found = against([FRONT[::-1]], lambda _: True, former=former)
    assert found is not None
    assert found.winner == 1
    assert rows_of(found)[0][2] == "alone"
    ledger: list[Entry] = list(former)
    against([FRONT[::-1]], lambda _: True, former=former, digest="y", note=ledger.append)
    assert tries_in(ledger)[-1].error == error_share(3, 1 - 0.95)


def by_clusters(clusters: int, above: float = 0.02) -> Held:
    return Held(PASS, Clustered(0.0, above, 0.0, clusters, clusters - 1.0))


@given(st.integers(2, 60), st.floats(0.0005, 0.1))
def test_the_verdict_is_over_documents_where_there_are_enough_and_both_bounds_are_kept(
    clusters: int, above: float
) -> None:
    held = by_clusters(clusters, above)
    found = certify(FRONT[:1], lambda _: held, plans=[FRONT[:1]], budget_percent=5, confidence=0.95, windows_digest="x")
    assert found is not None
    (tried,) = found.tries
    assert held.clustered is not None
    windows, documents = bounds(held.increase, tried.level)[1], clustered_bounds(held.clustered, tried.level)[1]
    enough = clusters >= LEAST_CLUSTERS
    assert tried.upper_percent == found.upper_percent == (documents if enough else windows)
    assert (tried.upper_by_windows_percent, tried.clusters) == (windows, clusters)
    assert tried.upper_by_documents_percent == (documents if np.isfinite(documents) else None)
    assert found.basis == tried.basis == ("documents" if enough else "windows")
    assert ("so they speak of other documents" in basis(found)) == enough
    assert (found.verdict == "certified") == (tried.upper_percent < 5)
    if found.verdict == "inconclusive":
        assert ("a text of more documents" in " ".join(outlook(found))) == enough


def test_a_map_that_was_stopped_early_is_never_certified() -> None:
    found = certify(
        FRONT[:1], lambda _: Held(PASS, stopped=True), plans=[FRONT[:1]], budget_percent=5, confidence=0.95,
        windows_digest="x",
    )  # fmt: skip
    assert found is not None
    assert (found.verdict, found.winner) == ("not certified", None)
    assert "stopped early" in rows_of(found)[0][1]
