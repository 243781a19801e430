from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.front import Point, hypervolume, knee, pareto_front


def point(trial: int, size: int, increase: float) -> Point:
    return Point(trial, 1000 / size, size, 10 * (1 + increase / 100), increase, 0.1, {}, "")


clouds = st.lists(st.tuples(st.integers(100, 140), st.integers(-5, 40)), max_size=25).map(
    lambda rows: [point(i, size, increase / 4) for i, (size, increase) in enumerate(rows)]
)


def beats(a: Point, b: Point) -> bool:
    no_worse = a.bytes <= b.bytes and a.increase_percent <= b.increase_percent
    return no_worse and (a.bytes < b.bytes or a.increase_percent < b.increase_percent)


@given(clouds)
def test_the_front_equals_brute_force(points: list[Point]) -> None:
    within = [p for p in points if p.increase_percent <= 5]
    unbeaten = {(p.bytes, p.increase_percent) for p in within if not any(beats(q, p) for q in within)}
    front = pareto_front(points, 5)
    assert {(p.bytes, p.increase_percent) for p in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert [p.bytes for p in front] == sorted(p.bytes for p in front)


@given(clouds)
def test_of_equal_points_the_earliest_trial_stays(points: list[Point]) -> None:
    for chosen in pareto_front(points, 5):
        same = [p.trial for p in points if (p.bytes, p.increase_percent) == (chosen.bytes, chosen.increase_percent)]
        assert chosen.trial == min(same)


@given(clouds)
def test_hypervolume_equals_a_count_of_cells(points: list[Point]) -> None:
    steps = 200
    across = [1 + 9 * (i + 0.5) / steps for i in range(steps)]
    up = [5 - 10 * (j + 0.5) / steps for j in range(steps)]
    inside = sum(any(p.compression >= x and p.increase_percent <= y for p in points) for x in across for y in up)
    brute = inside * (9 / steps) * (10 / steps)
    assert hypervolume(points, 5) == pytest.approx(brute, abs=9 * 10 * 2.5 / steps)


@given(clouds, st.integers(100, 140), st.integers(-5, 40))
def test_another_point_never_lowers_the_hypervolume(points: list[Point], size: int, increase: int) -> None:
    assert hypervolume([*points, point(99, size, increase / 4)], 5) >= hypervolume(points, 5) - 1e-12


def test_the_knee_is_the_bend() -> None:
    bend = [point(0, 100, 4.0), point(1, 110, 0.5), point(2, 150, 0.3), point(3, 200, 0.0)]
    chosen = knee(pareto_front(bend, 5))
    assert chosen is not None
    assert chosen.trial == 1
    assert knee([]) is None
    only = knee(bend[:1])
    assert only is not None
    assert only.trial == 0
