"""The exact programme over sizes against trying everything, and what it does where it must thin out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search.sampling.programme import frontier, frontier_reference

component = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(0, 60), min_size=k, max_size=k),
        st.lists(st.integers(-3, 40).map(lambda x: x / 8), min_size=k, max_size=k),
    )
)


@given(st.lists(component, min_size=1, max_size=6), st.integers(-10, 100))
def test_the_frontier_is_that_of_all_maps(components: list[tuple[list[int], list[float]]], limit: int) -> None:
    sizes, costs = [size for size, _ in components], [cost for _, cost in components]
    found = frontier(sizes, costs, limit / 8)
    assert list(zip(found.bytes.tolist(), found.cost.tolist(), strict=True)) == frontier_reference(
        sizes, costs, limit / 8
    )
    for total, cost, row in zip(found.bytes, found.cost, found.choices, strict=True):
        assert sum(size[k] for size, k in zip(sizes, row, strict=True)) == total
        assert sum(held[k] for held, k in zip(costs, row, strict=True)) == cost


def test_a_thinned_frontier_is_almost_as_good() -> None:
    rng = np.random.default_rng(0)
    sizes = [[1000 + int(rng.integers(5000)), int(rng.integers(1000)), 0] for _ in range(40)]
    costs = [[0.0, *sorted(rng.exponential(size=2))] for _ in range(40)]
    exact, thinned = frontier(sizes, costs, np.inf, most=10**6), frontier(sizes, costs, np.inf, most=1024)
    assert len(thinned.bytes) <= 1025
    for total, cost in zip(thinned.bytes, thinned.cost, strict=True):
        best = exact.cost[np.searchsorted(exact.bytes, total, side="right") - 1]
        assert best <= cost <= best + 0.02 * exact.cost.max()
