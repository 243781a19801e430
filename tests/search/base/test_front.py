from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.front import (
    Point,
    fastest,
    front_by_size,
    hypervolume,
    hypervolume_with_latency,
    knee,
    pareto_front,
)


def point(trial: int, size: int, increase: float) -> Point:
    return Point(trial, 1000 / size, size, 10 * (1 + increase / 100), increase, 0.1, {}, "")


clouds = st.lists(st.tuples(st.integers(100, 140), st.integers(-5, 40)), max_size=25).map(
    lambda rows: [point(i, size, increase / 4) for i, (size, increase) in enumerate(rows)]
)


clouds_with_latency = st.lists(
    st.tuples(st.integers(100, 112), st.integers(-5, 30), st.integers(1, 12)), max_size=25
).map(lambda rows: [replace(point(i, size, rise / 4), latency=time / 1e3) for i, (size, rise, time) in enumerate(rows)])


def objectives(p: Point) -> tuple[float, ...]:
    return (p.bytes, p.increase_percent) if p.latency is None else (p.bytes, p.increase_percent, p.latency)


def brute_front(points: list[Point]) -> list[Point]:
    """The front by its definition, of two objectives or of three."""
    within = [p for p in points if p.increase_percent <= 5 and p.stopped is None]

    def beaten(p: Point) -> bool:
        return any(
            all(a <= b for a, b in zip(objectives(q), objectives(p), strict=True))
            and (objectives(q) != objectives(p) or q.trial < p.trial)
            for q in within
            if q is not p
        )

    return sorted((p for p in within if not beaten(p)), key=lambda p: (*objectives(p), p.trial))


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


@given(clouds_with_latency | clouds)
def test_the_front_equals_brute_force_with_and_without_latency(points: list[Point]) -> None:
    assert pareto_front(points, 5) == brute_front(points)


@given(clouds_with_latency)
def test_where_all_are_equally_fast_latency_changes_nothing(points: list[Point]) -> None:
    same = [replace(p, latency=0.004) for p in points]
    without = [replace(p, latency=None) for p in points]
    assert [p.trial for p in pareto_front(same, 5)] == [p.trial for p in pareto_front(without, 5)]
    volume = hypervolume_with_latency(same, 5, 0.016)
    assert volume == pytest.approx(0.75 * hypervolume(without, 5))


@given(clouds_with_latency)
def test_without_its_third_axis_a_front_is_that_of_size_and_quality(points: list[Point]) -> None:
    without = [replace(p, latency=None) for p in points]
    held = front_by_size(pareto_front(points, 5))
    assert [objectives(p)[:2] for p in held] == [objectives(p) for p in pareto_front(without, 5)]
    assert hypervolume(points, 5) == pytest.approx(hypervolume(without, 5))
    chosen, other = knee(pareto_front(points, 5)), knee(pareto_front(without, 5))
    assert (None if chosen is None else objectives(chosen)[:2]) == (None if other is None else objectives(other))


@given(clouds_with_latency)
def test_the_volume_equals_a_count_of_cells(points: list[Point]) -> None:
    front, reference = pareto_front(points, 5), 0.0105  # of latencies in whole milliseconds
    sizes, rises = sorted({p.compression for p in points} | {1.0}), sorted({p.increase_percent for p in points} | {5.0})
    brute = 0.0
    for low, high in pairwise(sizes):
        for best, worst in pairwise(rises):
            for time in range(1, 11):
                if worst <= 5 and any(
                    p.compression >= high and p.increase_percent <= best and p.latency == time / 1e3 for p in front
                ):
                    brute += (high - low) * (worst - best) * (reference - time / 1e3) / reference
                    break
    assert hypervolume_with_latency(points, 5, reference) == pytest.approx(brute)


@given(clouds_with_latency)
def test_the_fastest_is_the_smallest_of_the_fastest(points: list[Point]) -> None:
    front = pareto_front(points, 5)
    found = fastest(front)
    assert (found is None) is (not front)
    assert found is None or (found.latency, found.bytes) == min((p.latency or 0.0, p.bytes) for p in front)
    assert fastest([replace(p, latency=None) for p in front]) is None
