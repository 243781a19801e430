"""Sharing what candidates have in common changes no result, and keeps to its bytes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.evaluation.prefix_cache import PrefixCache, Prefixes
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, random_model, some_windows


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("capacity", [0, 150_000, 1 << 30])
def test_evaluations_are_the_same_with_any_cache(family: str, capacity: int) -> None:
    model, windows = random_model(CONFIGS[family]), some_windows(70)
    components = find_components(model)
    converter, cache = Converter(model, Scheme(activations="none")), PrefixCache(capacity)
    free = [c.name for c in components if c.pin is None and c.kind in ("embedding", "in_proj", "out_proj")]
    base = PrecisionMap.uniform("fp16", components)
    for choice in product(("fp16", "int8"), repeat=min(4, len(free))):
        held = base.changed(dict(zip(free, choice, strict=False)))
        precisions = held.to_json()
        before = [
            tuple(precisions[c.name] for c in components if c.stage <= layer) for layer in range(1, len(model.layers))
        ]
        converted = converter.convert(held)
        shared = evaluate(converted, windows, prefixes=Prefixes(cache, before))
        assert np.array_equal(shared.nll, evaluate(converted, windows).nll)
        assert cache.bytes <= capacity
    assert (cache.reuse.reused > 0) == (capacity > 0)
    assert cache.reuse.reused <= cache.reuse.layers


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=30), st.integers(0, 400))
def test_what_is_held_never_takes_more_than_its_bytes(chains: list[tuple[int, int]], capacity: int) -> None:
    cache = PrefixCache(capacity)
    for name, depth in chains:
        keys = [((name, place), b"") for place in range(depth)]
        found = cache.deepest(keys)
        start = 0 if found is None else found[0] + 1
        if found is not None:
            assert found[1].tolist() == [float(found[0])] * 10
        cache.keep([(keys[place], torch.full((10,), float(place))) for place in range(start, depth)])
        assert cache.bytes <= capacity
        assert cache.bytes % 40 == 0


def test_where_there_is_no_room_for_all_the_shallow_ones_stay() -> None:
    cache = PrefixCache(80)
    keys = [(place, b"") for place in range(4)]
    cache.keep([(key, torch.zeros(10)) for key in keys])
    found = cache.deepest(keys)
    assert found is not None
    assert found[0] == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(80)
    one, two, three = (("one", b""), ("two", b""), ("three", b""))
    for key in (one, two):
        cache.keep([(key, torch.zeros(10))])
    assert cache.deepest([one]) is not None
    cache.keep([(three, torch.zeros(10))])
    assert cache.deepest([two]) is None
    assert cache.deepest([one]) is not None
