"""A layer as one call, against the same layer module by module."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from ssm_mp.blocks.block import State
from ssm_mp.blocks.mamba1 import Mamba1Mixing
from ssm_mp.blocks.mamba1_compiled import CompiledBranch
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.model import LanguageModel, Layer, Residual
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import MAMBA, MAMBAS, random_model


def converted(name: str, rules: Mapping[str, str]) -> LanguageModel:
    """A random model in these precisions, its inputs quantised by the token."""
    model = random_model(MAMBAS[name])
    components = find_components(model)
    pins = frozenset(c.name for c in components if c.pin == "always")
    return Converter(model, Scheme(activations="dynamic")).convert(PrecisionMap.from_rules(rules, components, pins))


def first_branch(model: LanguageModel) -> Residual:
    """The only branch of the first layer."""
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    (branch,) = layer.branches
    assert isinstance(branch, Residual)
    return branch


def mixer(branch: Residual) -> Mamba1Mixing:
    """The only block of a branch."""
    (mixing,) = branch.mixings
    assert isinstance(mixing, Mamba1Mixing)
    return mixing


def compiled(branch: Residual) -> CompiledBranch | None:
    """The branch as one call."""
    return mixer(branch).compiled(branch.norm)


def layers(name: str, rules: Mapping[str, str]) -> tuple[Residual, Residual]:
    """The first layer as one call, and module by module; skips where this CPU has no such call."""
    found = []
    for by_module in (False, True):
        branch = first_branch(converted(name, rules))
        if by_module:
            mixer(branch).scan = partial(mixer(branch).scan)  # no longer the scan that the call computes
        found.append(branch)
    if compiled(found[0]) is None:
        pytest.skip("this CPU has no instruction for it")
    assert compiled(found[1]) is None
    return found[0], found[1]


def assert_near(found: tuple[Tensor, Sequence[State]], expected: tuple[Tensor, Sequence[State]]) -> None:
    for one, other in zip((found[0], *found[1][0]), (expected[0], *expected[1][0]), strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0  # a convolution of one tap carries nothing
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, largest))


RULES = {
    "int8": {"*": "int8"},
    "fp16": {"*": "fp16"},
    "mixed": {"*": "int8", "*.in_proj": "fp16", "*.dt_proj": "fp16"},
    "codes": {"*": "nf4", "*.x_proj": "int3", "*.dt_proj": "int8", "*.conv1d": "fp16"},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MAMBAS)
@pytest.mark.parametrize(("batch", "length"), [(9, 1), (5, 2), (1, 40), (3, 300), (20, 30)])
def test_it_gives_what_the_modules_give(name: str, rules: str, batch: int, length: int) -> None:
    one, other = layers(name, RULES[rules])
    x = torch.randn(batch, length, MAMBAS[name].d_model)
    with torch.inference_mode():
        assert_near(one.carry(x, None), other.carry(x, None))


@pytest.mark.parametrize("name", MAMBAS)
def test_states_are_carried_and_those_before_are_left_as_they_are(name: str) -> None:
    one, other = layers(name, RULES["int8"])
    x = torch.randn(10, 8, MAMBAS[name].d_model)
    with torch.inference_mode():
        _, before = one.carry(x[:, :5], None)
        kept = copy.deepcopy(before)
        # two tokens are fewer than the convolution looks back
        assert_near(one.carry(x[:, 5:7], before), other.carry(x[:, 5:7], before))
        assert all(torch.equal(one, other) for one, other in zip(before[0], kept[0], strict=True))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    one, _ = layers("mamba", RULES["mixed"])
    x, before, found = torch.randn(6, 100, MAMBA.d_model), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(one(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_a_token_that_is_not_finite_spoils_its_sequence_from_there_on_and_no_other() -> None:
    one, _ = layers("mamba", RULES["int8"])
    x = torch.randn(3, 20, MAMBA.d_model)
    x[1, 7, 3] = torch.nan
    with torch.inference_mode():
        finite = one(x).isfinite().all(dim=-1)
    assert finite[0].all()
    assert finite[2].all()
    assert finite[1].tolist() == [True] * 7 + [False] * 13


def test_a_copy_and_a_weight_that_was_replaced_compute_with_their_own() -> None:
    one, other = layers("mamba", RULES["int8"])
    x = torch.randn(2, 30, MAMBA.d_model)
    with torch.inference_mode():
        first = one(x)
        assert torch.equal(copy.deepcopy(one)(x), first)
    for layer in (one, other):
        q = mixer(layer).in_proj.weight.q  # type: ignore[union-attr]
        q.copy_(q.flip(0))  # type: ignore[operator]
    with torch.inference_mode():
        assert not torch.allclose(one(x), first)
        assert_near(one.carry(x, None), other.carry(x, None))


def test_its_observer_is_told_where_the_time_goes() -> None:
    one, _ = layers("mamba", RULES["int8"])
    told: list[Mapping[str, float]] = []
    one.observer = told.append
    began = time.perf_counter()
    with torch.inference_mode():
        one(torch.randn(2, 30, MAMBA.d_model))
    whole = time.perf_counter() - began
    assert set(told[0]) == {"norm", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    assert min(told[0].values()) > 0
    assert sum(told[0].values()) < whole


def test_a_model_of_floats_is_computed_by_the_modules() -> None:
    assert compiled(first_branch(random_model(MAMBA))) is None
