from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.certifiable import Certifying, alike_near, certifiable_percent, expected
from search.base.front import Point, front_by_size, pareto_front
from search.results.plans import CHANCES, chance, plans
from tests.search.base.test_front import point


@st.composite
def fronts(draw: st.DrawFn) -> list[Point]:
    """On size and quality, the smallest first, each with its error on the search windows."""
    drawn = draw(st.lists(st.tuples(st.integers(1, 999), st.floats(-1, 5), st.floats(0, 1)), max_size=12))
    found = [
        replace(point(i, size, rise), stderr_percent=error, windows=128) for i, (size, rise, error) in enumerate(drawn)
    ]
    return front_by_size(pareto_front(found, 5))


@given(fronts(), st.integers(2, 2000))
def test_plans_go_from_the_safest_to_the_smallest_and_share_no_map(front: list[Point], windows: int) -> None:
    found = plans(front, 5.0, Certifying(windows, 0.03))
    trials = [chosen.trial for plan in reversed(found) for chosen in plan]
    assert trials == [chosen.trial for chosen in reversed(front)][len(front) - len(trials) :]
    assert all(found)
    assert (len(found) > 0) == (len(front) > 0)
    if front:
        assert found[0][-1] == front[0]


@given(fronts(), st.integers(2, 2000))
def test_a_plan_begins_at_the_smallest_map_that_is_nearly_sure_to_pass(front: list[Point], windows: int) -> None:
    found = plans(front, 5.0, Certifying(windows, 0.03))
    for plan, least in zip(found, CHANCES, strict=False):
        start = plan[0]
        sure = [chosen for chosen in front if chance(chosen, 5.0, Certifying(windows, 0.03)) >= least]
        behind = [chosen for chosen in plan[1:] if chosen in sure]
        assert not behind
        assert start in sure or start == front[-1]


def test_the_order_depends_on_nothing_but_the_search() -> None:
    assert list(inspect.signature(plans).parameters) == ["front", "budget_percent", "certifying"]
    assert "upper_percent" not in inspect.getsource(inspect.getmodule(plans) or plans)


def test_fewer_windows_begin_at_a_safer_map() -> None:
    front = [replace(point(i, 100 + i, 4.9 - i / 4), stderr_percent=0.35, windows=128) for i in range(20)]
    starts = [plans(front, 5.0, Certifying(windows, 0.03))[0][0].trial for windows in (64, 256, 512, 4096)]
    assert starts == sorted(starts, reverse=True)
    assert len(set(starts)) > 2
    assert 2.5 < front[plans(front, 5.0, Certifying(512, 0.03))[0][0].trial].increase_percent < 3.9


@given(st.floats(0.0001, 0.1), st.integers(16, 4000))
def test_what_can_be_certified_lies_below_the_budget_by_what_the_bound_reaches(own: float, windows: int) -> None:
    certifying = Certifying(windows, 0.03)
    above = expected(own, 128, certifying).above
    assert above > own
    assert above > expected(own, 128, Certifying(2 * windows, 0.03)).above
    assert 0 <= certifiable_percent(5.0, above) < 5
    assert certifiable_percent(5.0, 0.0) == pytest.approx(5.0)


def test_documents_whose_windows_are_alike_begin_at_a_safer_map() -> None:
    front = [replace(point(i, 100 + i, 4.9 - i / 4), stderr_percent=0.35, windows=128) for i in range(20)]
    sources = np.arange(512) % 34
    starts = [
        plans(front, 5.0, Certifying(512, 0.03, sources[:128], sources, alike))[0][0].trial for alike in (0, 0.1, 0.3)
    ]
    assert starts == sorted(starts)
    assert len(set(starts)) == 3


def test_how_much_windows_are_alike_is_learned_from_the_maps_near_the_budget() -> None:
    rng = np.random.default_rng(0)
    sources = np.repeat(np.arange(26), 5)
    near = [0.05 + 0.04 * (0.4 * rng.normal(size=26)[sources] + 0.9 * rng.normal(size=130)) for _ in range(9)]
    far = [0.5 + rng.normal(size=26)[sources] for _ in range(20)]
    assert 0.05 < alike_near([*far, *near], sources, 5.0) < 0.3
    assert alike_near(near, None, 5.0) == alike_near([], sources, 5.0) == 0
    assert alike_near(near, np.zeros(130), 5.0) == 0
