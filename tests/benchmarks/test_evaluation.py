"""The figures of `benchmarks.evaluation` follow from the times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.evaluation import PLAIN_CANDIDATES, Timed, evaluated, summarise
from benchmarks.speed_limit import Limit


def timed(ours: float, racing: float, windows: int, plain: float | None = None) -> Timed:
    return Timed(ours, 2 * ours, racing, Limit(0.1, 0.05, 0.05), windows, 10.0, plain, None if plain is None else 10.1)


def test_candidates_an_hour_are_those_of_all_the_time_spent() -> None:
    found = summarise([timed(0.5, 0.25, 64, 4.0), timed(0.3, 0.15, 64), timed(0.7, 0.35, 64, 6.0)], 128, 100)
    assert found["plain"] == pytest.approx(3600 / 5)
    assert found["ours"] == pytest.approx(3600 / 0.5)
    assert found["ratio"] == pytest.approx(10)
    assert found["ratio_racing"] == pytest.approx(20)
    assert found["limit_fraction"] == pytest.approx(0.2 / 1.0)
    assert found["limit_fraction_sharing"] == pytest.approx(0.2 / 0.5)
    assert found["tokens_per_second"]["ours"] == pytest.approx(128 * 100 / 0.5)
    assert found["tokens_per_second"]["ours_racing"] == pytest.approx(64 * 100 / 0.25)
    assert found["largest_relative_difference_of_perplexity"] == pytest.approx(0.01)


def test_without_a_known_limit_there_are_no_figures_of_it() -> None:
    one = timed(0.5, 0.25, 64, 4.0)
    found = summarise([replace(one, limit=None)], 128, 100)
    assert not any("limit" in key for key in found)
    assert "limit" not in found["least_seconds"]
    assert summarise([one], 128, 100)["least_seconds"]["limit"] == pytest.approx(0.2)
    assert found["ours"] == pytest.approx(3600 / 0.5)


@pytest.mark.slow
def test_the_hybrid_is_searched_and_evaluated_by_every_way() -> None:
    pytest.importorskip("transformers")
    few = ['search.probe="none"', "data.search_windows=4", "data.calibration_windows=8"]
    found = evaluated("hybrid", PLAIN_CANDIDATES, ["fp16", "int8"], "random", "cpu", few)
    assert found["candidates"] >= found["plain_candidates"] == PLAIN_CANDIDATES
    assert found["largest_relative_difference_of_perplexity"] < 2e-3
    assert found["tokens_per_second"]["ours"] > 0
