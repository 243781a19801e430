"""How figures of a metric are held and shown."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.front import Point, hypervolume, pareto_front
from search.base.metric import KL, PERPLEXITY

POINTS = [
    Point(n, size, int(1e6 / size), 9.0, 100 * math.expm1(nats), 0.1, {}, "")
    for n, (size, nats) in enumerate([(2.0, 0.001), (3.0, 0.01), (5.0, 0.04), (8.0, 0.2), (2.5, 0.02)])
]


@given(st.floats(min_value=1e-9, max_value=50))
def test_nats_survive_the_scale_they_are_held_on(nats: float) -> None:
    assert KL.shown(KL.held(nats)) == pytest.approx(nats, rel=1e-9)


@given(st.floats(min_value=-99, max_value=1e6), st.floats(min_value=0, max_value=1e3))
def test_perplexity_is_shown_as_it_is_held(percent: float, stderr: float) -> None:
    assert (PERPLEXITY.shown(percent), PERPLEXITY.held(percent)) == (percent, percent)
    assert PERPLEXITY.spread(percent, stderr) == stderr
    values = {"increase_percent": percent, "stderr_percent": stderr, "windows": 3}
    assert PERPLEXITY.answer(values) == values
    assert PERPLEXITY.said(percent, 2) == f"{percent:+.2f} %"


def test_an_error_is_that_of_the_logarithm() -> None:
    nats, stderr = 0.3, 0.01
    assert KL.spread(100 * math.expm1(nats), 100 * math.exp(nats) * stderr) == pytest.approx(stderr)


def test_an_answer_names_and_converts_every_figure_in_percent() -> None:
    percent = 100 * math.expm1(0.25)
    values = {
        "verdict": "certified",
        "increase_percent": percent,
        "stderr_percent": 100 * math.exp(0.25) * 0.5,
        "upper_percent": None,
        "increase_interval_percent": [percent, None],
        "tries": [{"trial": 3, "lower_percent": percent}],
    }
    found = KL.answer(values)
    assert "percent" not in json.dumps(found)
    assert found["increase_nats"] == pytest.approx(0.25)
    assert found["stderr_nats"] == pytest.approx(0.5)
    assert found["upper_nats"] is None
    assert found["increase_interval_nats"] == [pytest.approx(0.25), None]
    assert found["tries"] == [{"trial": 3, "lower_nats": pytest.approx(0.25)}]


def test_a_hypervolume_in_nats_is_the_area_under_the_budget_in_nats() -> None:
    budget = KL.held(0.05)
    assert [p.trial for p in pareto_front(POINTS, budget)] == [2, 1, 0]
    expected = (0.05 - 0.001) * 1 + (0.05 - 0.01) * 1 + (0.05 - 0.04) * 2
    assert hypervolume(POINTS, budget, metric=KL) == pytest.approx(expected)
    assert hypervolume(POINTS, budget) != pytest.approx(expected)


def test_infinite_figures_stay_so() -> None:
    assert KL.shown(math.inf) == math.inf
    assert KL.held(800) == math.inf
    assert KL.shown(-100.0) == -math.inf
