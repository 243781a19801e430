"""Clusters of like sensitivity: the best there are, bounded, contiguous, never of two kinds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.sampling.clusters import clusters, loss_of, sensitivities


@st.composite
def things(draw: st.DrawFn, most: int = 7) -> tuple[np.ndarray, np.ndarray, list[str]]:
    n = draw(st.integers(1, most))
    numbers = st.floats(-3, 3, allow_nan=False, width=16)
    position = np.array(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=float)
    weight = np.array(draw(st.lists(st.integers(1, 50), min_size=n, max_size=n)), dtype=float)
    kinds = draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    return position, weight, kinds


def divisions(indices: Sequence[int]) -> Iterator[list[list[int]]]:
    """All divisions of things into clusters."""
    if not indices:
        yield []
        return
    first, rest = indices[0], indices[1:]
    for size in range(len(rest) + 1):
        for beside in itertools.combinations(rest, size):
            for others in divisions([i for i in rest if i not in beside]):
                yield [[first, *beside], *others]


@given(things(), st.integers(2, 5))
def test_no_division_into_as_many_clusters_loses_less(
    drawn: tuple[np.ndarray, np.ndarray, list[str]], most: int
) -> None:
    position, weight, kinds = drawn
    found = clusters(position, weight, kinds, most)
    assert sorted(i for held in found for i in held) == list(range(len(position)))
    assert len(found) <= most
    assert all(len({kinds[i] for i in held}) == 1 for held in found)
    least = min(
        loss_of(position, weight, held)
        for held in divisions(range(len(position)))
        if len(held) <= most and all(len({kinds[i] for i in one}) == 1 for one in held)
    )
    assert loss_of(position, weight, found) == pytest.approx(least, abs=1e-9)


@given(things(40), st.integers(2, 12))
def test_clusters_of_a_kind_are_contiguous_and_in_order(
    drawn: tuple[np.ndarray, np.ndarray, list[str]], most: int
) -> None:
    position, weight, kinds = drawn
    found = clusters(position, weight, kinds, most)
    for kind in set(kinds):
        ranges = [(position[held].min(), position[held].max()) for held in found if kinds[held[0]] == kind]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(sorted(ranges)))
    means = [np.average(position[held], weights=weight[held]) for held in found]
    assert means == sorted(means)


def test_as_many_clusters_as_things_leave_each_alone() -> None:
    position = np.array([3.0, 1.0, 2.0])
    assert clusters(position, np.ones(3), "aaa", 9) == [[1], [2], [0]]


def test_more_kinds_than_clusters_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 kinds"):
        clusters(np.zeros(3), np.ones(3), "abc", 2)


def test_costs_of_nothing_and_less_are_alike() -> None:
    found = sensitivities(np.array([-1.0, 0.0, 1e-9, 1.0, 2.0]), np.ones(5))
    assert found[0] == found[1] == found[2] < found[3] < found[4]
    assert found[4] - found[3] == pytest.approx(np.log(2))
    assert sensitivities(np.array([-1.0, 0.0]), np.ones(2)).tolist() == [0.0, 0.0]
