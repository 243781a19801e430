"""Expected hypervolume gain against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.front import Point, hypervolume, hypervolume_with_latency
from search.sampling.gain import area, expected_gain, expected_volume_gain, staircase, terrain, volume

maps = st.lists(st.tuples(st.integers(1, 60), st.integers(-10, 80)), max_size=12)


def dominated(held: list[tuple[float, float]]) -> float:
    points = [Point(i, c, round(1e6 / c), 1.0, y, 0.0, {}, "") for i, (c, y) in enumerate(held)]
    return hypervolume(points, 5.0)


@given(maps)
def test_the_area_is_the_hypervolume_of_the_front(found: list[tuple[int, int]]) -> None:
    held = [(c / 8 + 0.5, y / 10) for c, y in found]
    stairs = staircase(np.array([c for c, _ in held]), np.array([y for _, y in held]), 5.0)
    assert area(stairs, 5.0) == pytest.approx(dominated(held))


@given(maps, st.integers(1, 60), st.integers(-10, 80))
def test_a_certain_map_gains_what_it_adds_to_the_hypervolume(found: list[tuple[int, int]], c: int, y: int) -> None:
    held = [(a / 8 + 0.5, b / 10) for a, b in found]
    stairs = staircase(np.array([a for a, _ in held]), np.array([b for _, b in held]), 5.0)
    gain = expected_gain(stairs, np.array([c / 8 + 0.5]), np.array([y / 10]), np.array([1e-9]))
    assert gain[0] == pytest.approx(dominated([*held, (c / 8 + 0.5, y / 10)]) - dominated(held), abs=1e-6)


def test_an_uncertain_map_gains_the_mean_of_what_it_may_add() -> None:
    held = [(2.0, 0.3), (3.5, 1.2), (5.0, 3.0), (6.0, 4.5)]
    stairs = staircase(np.array([c for c, _ in held]), np.array([y for _, y in held]), 5.0)
    draws = np.random.default_rng(0).normal(1.5, 0.8, 20000)
    added = np.mean([dominated([*held, (4.5, y)]) for y in draws[:4000]]) - dominated(held)
    gain = expected_gain(stairs, np.array([4.5]), np.array([1.5]), np.array([0.8]))
    assert gain[0] == pytest.approx(added, rel=0.05)


three = st.tuples(st.integers(1, 60), st.integers(-10, 80), st.integers(0, 20))
"""Compression in eighths above 0.5, increase in tenths of a percent, latency in milliseconds; the corner is 16 ms."""


def with_latency(held: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compression, fraction of the corner's latency saved, increase in percent."""
    values = np.array(held, dtype=float).reshape(-1, 3)
    return values[:, 0] / 8 + 0.5, 1 - values[:, 2] / 16, values[:, 1] / 10


def dominated_with_latency(held: list[tuple[int, int, int]]) -> float:
    rows = [(c / 8 + 0.5, y / 10, t / 1e3) for c, y, t in held]
    points = [Point(i, c, round(1e6 / c), 1.0, y, 0.0, {}, "", latency=t) for i, (c, y, t) in enumerate(rows)]
    return hypervolume_with_latency(points, 5.0, 0.016)


@given(st.lists(three, max_size=12))
def test_the_volume_is_the_hypervolume_of_the_front_of_three(held: list[tuple[int, int, int]]) -> None:
    assert volume(terrain(*with_latency(held), 5.0), 5.0) == pytest.approx(dominated_with_latency(held))


@given(st.lists(three, max_size=12), three)
def test_a_certain_map_gains_what_it_adds_to_the_volume(
    held: list[tuple[int, int, int]], new: tuple[int, int, int]
) -> None:
    compression, saved, increase = with_latency([new])
    gain = expected_volume_gain(terrain(*with_latency(held), 5.0), compression, saved, increase, np.array([1e-9]))
    assert gain[0] == pytest.approx(dominated_with_latency([*held, new]) - dominated_with_latency(held), abs=1e-6)


@given(maps, st.integers(1, 60), st.integers(-10, 80))
def test_where_all_are_equally_fast_the_gain_is_that_of_two_objectives(
    found: list[tuple[int, int]], c: int, y: int
) -> None:
    compression, saved, increase = with_latency([(*held, 12) for held in found])
    new = (np.array([c / 8 + 0.5]), np.array([y / 10]), np.array([0.7]))
    volume_gain = expected_volume_gain(
        terrain(compression, saved, increase, 5.0), new[0], np.array([0.25]), new[1], new[2]
    )
    assert volume_gain[0] == pytest.approx(0.25 * expected_gain(staircase(compression, increase, 5.0), *new)[0])


def test_a_coarser_terrain_says_nearly_the_same() -> None:
    rng = np.random.default_rng(0)
    compression, saved = rng.uniform(2, 6, 400), rng.uniform(0.1, 0.9, 400)
    increase = 0.2 * compression**1.5 + 2 * saved + rng.exponential(0.3, 400) - 0.5
    exact, coarse = (terrain(compression, saved, increase, 5.0, most) for most in (1000, 40))
    assert max(coarse.heights.shape) <= 41 < max(exact.heights.shape)
    assert volume(coarse, 5.0) == pytest.approx(volume(exact, 5.0), rel=0.02)
    new = (rng.uniform(2, 6, 50), rng.uniform(0.1, 0.9, 50), rng.uniform(0, 3, 50), np.full(50, 0.3))
    ours, theirs = expected_volume_gain(coarse, *new), expected_volume_gain(exact, *new)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99
