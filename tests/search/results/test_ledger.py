"""The error of a study's certificates, over any history of tries: never more than is allowed, never used up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.base.confidence import reach
from search.base.errors import StudyError
from search.problem.run_directory import TRIES, RunDirectory
from search.results.certify import Certificate, Held, Note, certificate_from_json, certify
from search.results.ledger import (
    Entry,
    Planned,
    Try,
    allowed_error,
    entries_of,
    error_left,
    error_share,
    shares,
    still_good,
)
from search.results.outlook import outlook
from ssm_mp.evaluation.evaluate import Increase
from tests.search.base.test_front import point

WINDOWS = 512
CONFIDENCES = st.sampled_from([0.51, 0.8, 0.9, 0.95, 0.99, 0.999, 1 - 1e-9])


def of_0_4(number: int, confidence: float = 0.95) -> Try:
    """Try `number` of a ledger of version 0.4."""
    held = 1 - (1 - confidence) / 2.0**number
    upper = math.inf if held == 1 else 9.0
    return Try(number, "inconclusive", held, 0.1, -1.0, upper, 5.0, WINDOWS, "old")


def of_now(former: Sequence[Entry], confidence: float) -> Try:
    """A try of version 0.5, which spent a share by itself."""
    error = allowed_error(former, 1 - confidence)
    return Try(len(former), "inconclusive", 1 - error, 0.1, -1.0, 9.0, 5.0, WINDOWS, "new", error)


def planned_now(former: Sequence[Entry], confidence: float) -> Planned:
    error = allowed_error(former, 1 - confidence)
    return Planned(1 + shares(former), (len(former), 7), error, 5.0, "new")


def certified(
    former: Sequence[Entry],
    log_mean: float = 0.001,
    measured: Increase | None = None,
    note: Note = lambda entry: None,
) -> Certificate:
    chosen = [point(0, 100, 4.0)]
    found = certify(
        chosen,
        lambda _: Held(measured or Increase(log_mean, 0.001, WINDOWS)),
        plans=[chosen],
        note=note,
        budget_percent=5,
        confidence=0.95,
        windows_digest="now",
        former=former,
    )
    assert found is not None
    return found


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(1e-12, 0.5, exclude_max=True))
def test_all_shares_together_stay_within_the_error_and_none_vanishes(tries: int, error: float) -> None:
    shares = [error_share(number + 1, error) for number in range(tries)]
    assert sum(map(Fraction, shares)) <= Fraction(error)
    assert shares == sorted(shares, reverse=True)
    assert error_share(10**9, error) > 0


@settings(deadline=None)
@given(st.lists(CONFIDENCES, max_size=70), st.lists(st.tuples(CONFIDENCES, st.booleans()), max_size=40))
def test_a_ledger_of_all_versions_and_any_confidences_never_spends_more_than_it_may(
    old: list[float], new: list[tuple[float, bool]]
) -> None:
    ledger: list[Entry] = [of_0_4(number, confidence) for number, confidence in enumerate(old, 1)]
    for confidence, alone in new:
        ledger.append(of_now(ledger, confidence) if alone else planned_now(ledger, confidence))
        assert ledger[-1].spent > 0
    largest = max([1 - confidence for confidence in (*old, *(held for held, _ in new))], default=0.0)
    # a confidence of version 0.4 is rounded to the numbers next to 1, half of 2^-53 off at most
    assert sum(Fraction(tried.spent) for tried in ledger) <= Fraction(largest) + len(old) * Fraction(1, 2**54)


@settings(deadline=None)
@given(st.lists(CONFIDENCES, max_size=30), st.lists(st.tuples(CONFIDENCES, st.booleans()), max_size=30), CONFIDENCES)
def test_what_still_counts_has_spent_no_more_than_is_allowed_now(
    old: list[float], new: list[tuple[float, bool]], now: float
) -> None:
    ledger: list[Entry] = [of_0_4(number, confidence) for number, confidence in enumerate(old, 1)]
    for confidence, alone in new:
        ledger.append(of_now(ledger, confidence) if alone else planned_now(ledger, confidence))
    left = allowed_error(ledger, 1 - now)
    together = sum(Fraction(tried.spent) for tried in still_good(ledger, 1 - now)) + Fraction(left)
    assert together <= Fraction(1 - now) + len(old) * Fraction(1, 2**54)


def test_tries_at_one_confidence_all_count() -> None:
    ledger = [of_0_4(number) for number in range(1, 6)]
    for _ in range(5):
        ledger.append(of_now(ledger, 0.95))
    assert still_good(ledger, 1 - 0.95) == ledger
    assert still_good(ledger, 1 - 0.9) == ledger
    assert still_good(ledger, 1 - 0.99) == []


@pytest.mark.parametrize("former", [0, 1, 10, 48, 49, 60, 200])
def test_a_map_far_below_the_budget_is_certified_after_any_number_of_tries(former: int) -> None:
    old = [of_0_4(number) for number in range(1, former + 1)]
    assert certified(old).verdict == "certified"
    new: list[Try] = []
    for _ in range(former):
        new.append(of_now(new, 0.95))
    found = certified(new)
    assert found.verdict == "certified"
    assert (found.tries[0].error or 0) > 1e-7


def test_a_try_that_version_0_4_could_not_decide_any_more_is_made_again() -> None:
    stuck = replace(of_0_4(60), trial=0, windows_digest="now")
    assert stuck.confidence == 1
    assert certified([*map(of_0_4, range(1, 60)), stuck]).verdict == "certified"
    assert error_left([stuck], 0.05) == 0.05  # it spent nothing


def test_the_eleventh_try_needs_fewer_standard_errors_than_by_halving() -> None:
    needed = [reach(error_share(number, 0.05), 0.0, WINDOWS) for number in (1, 11, 50)]
    assert needed == pytest.approx([1.88, 3.50, 4.26], abs=0.01)  # as the docstring says
    halved = [reach(0.05 / 2**number, 0.0, WINDOWS) for number in (1, 11, 50)]
    assert halved == pytest.approx([1.96, 4.10, 8.61], abs=0.01)


def test_what_is_spent_and_left_adds_up() -> None:
    ledger = [of_0_4(1), of_0_4(2)]
    assert error_left(ledger, 0.05) == pytest.approx(0.05 / 4)
    for _ in range(4):
        ledger.append(of_now(ledger, 0.95))
        assert math.fsum(tried.spent for tried in ledger) + error_left(ledger, 0.05) == pytest.approx(0.05)


def test_the_outlook_says_what_is_left_and_how_many_windows_would_do() -> None:
    ledger: list[Entry] = []
    found = certified([], log_mean=0.048, note=ledger.append)
    assert found.verdict == "inconclusive"
    spent, advice = outlook(found)
    assert "share an error of 5 %: 3.04 % is spent, 1.96 % left" in spent
    assert "may spend 0.76 %: its bounds reach 2.44 standard errors, the first's reached 1.88" in spent
    wanted = int(advice.partition("to about ")[2].partition(" ")[0].replace(",", ""))
    assert WINDOWS < wanted < 20 * WINDOWS
    chosen = [point(0, 100, 4.0)]
    scaled = certify(
        chosen,
        lambda _: Held(Increase(0.048, 0.001 * math.sqrt(WINDOWS / wanted), wanted)),
        plans=[chosen], budget_percent=5, confidence=0.95, windows_digest="more", former=ledger,
    )  # fmt: skip
    assert scaled is not None
    assert scaled.verdict == "certified"
    assert len(outlook(scaled)) == 1  # nothing to do


def test_the_outlook_of_a_map_at_the_budget_promises_no_number_of_windows() -> None:
    found = certified([], log_mean=math.log1p(0.05))
    assert "raise `[data] certify_windows` and run" in outlook(found)[1]


def test_no_history_and_no_spread_is_too_wild_for_the_outlook() -> None:
    former: list[Try] = []
    for number in (0, 50, 900):
        former += [of_0_4(k) for k in range(len(former) + 1, number + 1)]
        for increase in (Increase(0.01, 100.0, 2), Increase(0.0487, 1e-5, 2), Increase(-300.0, 1e3, 2)):
            found = certified(former, measured=increase)
            assert "nan" not in " ".join(outlook(found))
            json.dumps(found.to_json(), allow_nan=False)


def test_where_hardly_any_error_is_left_the_outlook_says_what_renews_it() -> None:
    few = certified([of_0_4(1)], log_mean=0.045)
    assert "Hardly any error" not in " ".join(outlook(few))
    many = certified([of_0_4(number) for number in range(1, 50)], log_mean=0.045)
    assert many.verdict == "inconclusive"
    said = outlook(many)[1]
    assert "Hardly any error is left, and other windows do not renew it" in said
    assert "a text that no map was tested on" in said


def test_a_certificate_of_version_0_4_has_an_outlook_without_figures_of_the_error() -> None:
    values = {**certified([], log_mean=0.048).to_json()}
    del values["error_left"], values["next_error"]
    values["tries"] = [{k: v for k, v in tried.items() if k != "error"} for tried in values["tries"]]
    found = certificate_from_json(values)
    assert (found.error_left, found.tries[0].error) == (None, None)
    assert len(outlook(found)) == 1


def test_tries_are_written_as_strict_json_and_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    tries = [of_0_4(3), replace(of_now([], 0.95), upper_percent=math.inf, error=3e-303)]
    run.append_lines(TRIES, [tried.to_json() for tried in tries])
    assert "Infinity" not in (tmp_path / TRIES).read_text(encoding="utf-8")
    assert entries_of(run.read_lines(TRIES), "x") == tries
    old = '{"trial": 1, "verdict": "inconclusive", "confidence": 1.0, "increase_percent": 0.1, "lower_percent": '
    old += '-100.0, "upper_percent": Infinity, "budget_percent": 5.0, "windows": 2, "windows_digest": "d"}'
    (read,) = entries_of([json.loads(old)], "x")  # as version 0.4 wrote it
    assert isinstance(read, Try)
    assert (read.upper_percent, read.spent, read.error) == (math.inf, 0, None)


def test_a_sequence_and_its_tries_are_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    ledger: list[Entry] = []
    certified([], note=ledger.append)
    run.append_lines(TRIES, [entry.to_json() for entry in ledger])
    assert [type(entry) for entry in ledger] == [Planned, Try]
    assert entries_of(run.read_lines(TRIES), "x") == ledger


@pytest.mark.parametrize("line", [{"plan": [1]}, {"plan": 1}, {"trial": 1}, {"unknown": 1}, 7, None])
def test_a_damaged_try_is_named_with_its_file(line: object) -> None:
    with pytest.raises(StudyError, match=r"run/tries\.jsonl"):
        entries_of([line], "run/tries.jsonl")
