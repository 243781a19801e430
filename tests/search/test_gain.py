"""Expected hypervolume gain against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.front import Point, hypervolume
from search.gain import area, expected_gain, staircase

maps = st.lists(st.tuples(st.integers(1, 60), st.integers(-10, 80)), max_size=12)


def volume(held: list[tuple[float, float]]) -> float:
    points = [Point(i, c, round(1e6 / c), 1.0, y, 0.0, {}, "") for i, (c, y) in enumerate(held)]
    return hypervolume(points, 5.0)


@given(maps)
def test_the_area_is_the_hypervolume_of_the_front(found: list[tuple[int, int]]) -> None:
    held = [(c / 8 + 0.5, y / 10) for c, y in found]
    stairs = staircase(np.array([c for c, _ in held]), np.array([y for _, y in held]), 5.0)
    assert area(stairs, 5.0) == pytest.approx(volume(held))


@given(maps, st.integers(1, 60), st.integers(-10, 80))
def test_a_certain_map_gains_what_it_adds_to_the_hypervolume(found: list[tuple[int, int]], c: int, y: int) -> None:
    held = [(a / 8 + 0.5, b / 10) for a, b in found]
    stairs = staircase(np.array([a for a, _ in held]), np.array([b for _, b in held]), 5.0)
    gain = expected_gain(stairs, np.array([c / 8 + 0.5]), np.array([y / 10]), np.array([1e-9]))
    assert gain[0] == pytest.approx(volume([*held, (c / 8 + 0.5, y / 10)]) - volume(held), abs=1e-6)


def test_an_uncertain_map_gains_the_mean_of_what_it_may_add() -> None:
    held = [(2.0, 0.3), (3.5, 1.2), (5.0, 3.0), (6.0, 4.5)]
    stairs = staircase(np.array([c for c, _ in held]), np.array([y for _, y in held]), 5.0)
    draws = np.random.default_rng(0).normal(1.5, 0.8, 20000)
    added = np.mean([volume([*held, (4.5, y)]) for y in draws[:4000]]) - volume(held)
    gain = expected_gain(stairs, np.array([4.5]), np.array([1.5]), np.array([0.8]))
    assert gain[0] == pytest.approx(added, rel=0.05)
