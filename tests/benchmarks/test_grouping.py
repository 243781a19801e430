"""The truth of the grouping benchmark, and that a search of it finds what there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.grouping import Truth, World, programme, searched, synthetic

PRECISIONS = ("fp16", "int8", "nf4", "int3")


def small(seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    cost = rng.uniform(0.001, 0.03, (6, 1)) * np.array([0, 0.01, 1, 4])
    sizes = rng.integers(1000, 9000, (6, 1)) * np.array([16, 8, 4, 3])
    names = tuple(f"c{c}" for c in range(6))
    return World(names, ("e", *"xyxyx"), (-1, 0, 0, 1, 1, 2), PRECISIONS, sizes, cost, cost * 1.1, 7, 10**6)


@pytest.mark.parametrize("grouping", ["none", "layer", "kind", "auto 3"])
def test_every_grouping_divides_all_components_and_keeps_their_bytes(grouping: str) -> None:
    world = synthetic() if grouping == "none" else small()
    units = world.units(grouping)
    assert sorted(c for unit in units for c in unit) == list(range(len(world.names)))
    assert [0] in units  # the embedding
    catalogue = world.catalogue(units)
    for k in range(4):
        row = np.full((1, len(units)), k)
        assert catalogue.bytes(row)[0] == world.fixed + world.sizes[:, k].sum()


def test_a_map_costs_its_effects_and_each_of_its_pairs_once() -> None:
    world = small()
    truth = Truth(world)
    nothing, one, other = np.zeros(6, int), np.zeros(6, int), np.zeros(6, int)
    one[1], other[4] = 2, 3
    assert truth(nothing) == 0
    assert truth(one) == pytest.approx(world.effects[1, 2])
    both, pair = truth(one + other), world.effects[1, 2] + world.effects[4, 3]
    assert both != pytest.approx(pair, rel=1e-6)
    assert abs(both - pair) < np.sqrt(world.effects[1, 2] * world.effects[4, 3])


def test_a_search_of_a_small_world_comes_near_the_best_of_all_its_maps() -> None:
    world = small()
    truth = Truth(world)
    _, smallest = programme(world, truth)
    catalogue = world.catalogue(world.units("none"))
    every = np.array(list(itertools.product(range(4), repeat=6)))
    within = [truth(chosen) <= np.log1p(0.05) for chosen in every]
    best = catalogue.bytes(every)[within].min()
    found = searched(world, truth, "none", "gradient", 0)
    assert found.units == 6
    assert found.excess_percent == pytest.approx(100 * (best / smallest - 1), abs=1)
    assert 0.95 < found.fraction < 1.1
