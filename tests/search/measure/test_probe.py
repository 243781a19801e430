"""The inputs of layers that probes share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.measure.probe import Walk
from ssm_mp.evaluation.evaluate import advance, start
from tests.tiny import MAMBA, random_model, some_windows

MODEL, WINDOWS = random_model(MAMBA), some_windows(4)
LAYERS = len(MODEL.layers)


@given(st.lists(st.integers(0, LAYERS), min_size=1, max_size=6))
def test_a_walk_gives_the_input_of_each_layer_in_whatever_order_it_is_asked(order: list[int]) -> None:
    walk = Walk(MODEL, WINDOWS)
    for layer in order:
        found = walk.to(layer, lambda: None)
        expected = advance(MODEL, start(MODEL, WINDOWS), layer)
        assert found.layer == layer
        assert torch.equal(found.hidden, expected.hidden)


def test_a_walk_that_was_interrupted_goes_on_from_where_it_was() -> None:
    walk = Walk(MODEL, WINDOWS)

    def interrupted() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        walk.to(LAYERS, interrupted)
    calls: list[int] = []
    walk.to(LAYERS, lambda: calls.append(1))
    walk.to(LAYERS, lambda: calls.append(1))
    assert len(calls) == LAYERS
