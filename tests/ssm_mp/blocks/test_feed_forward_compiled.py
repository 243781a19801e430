"""A feed-forward as calls of the kernels, against the same module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.hidden import ACTIVATIONS, Activation, Hidden
from ssm_mp.kernels import feed_forward as kernels
from ssm_mp.kernels.compiler import library
from ssm_mp.modules.linear import Linear
from ssm_mp.programs.program import Program
from tests.ssm_mp.blocks.compiled_residual import WEIGHTS, Weights, assert_near, by_module, compiled, residual_of

D, HIDDEN = 24, 37
PLAIN = FeedForward(d_model=D, d_hidden=HIDDEN)
GATED = replace(PLAIN, gated=True, activation="silu")
BLOCKS: Mapping[str, FeedForward] = {
    **{str(activation): replace(PLAIN, activation=activation) for activation in ACTIVATIONS},
    "gated": GATED,
    "gated gelu": replace(GATED, activation="gelu", projection_bias=True),
    "fused": replace(GATED, gated=False, fused=True),
    "multipliers": replace(GATED, projection_bias=True, gate_multiplier=0.6, down_multiplier=1.7),
    "token gate": replace(GATED, token_gate=True),
    "all of it": replace(GATED, token_gate=True, gate_multiplier=0.6, down_multiplier=1.7),
    "filling vectors": replace(GATED, d_model=64, d_hidden=128),
}
MULTIPLIERS: Mapping[str, dict[str, float]] = {
    "plain": {}, "multiplied": {"before": 0.5, "after": 1.25, "residual": 0.7}
}  # fmt: skip

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")


@pytest.mark.parametrize("multipliers", MULTIPLIERS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_it_gives_what_the_modules_give(name: str, weights: Weights, multipliers: str) -> None:
    branch = residual_of(BLOCKS[name], weights, **MULTIPLIERS[multipliers])  # type: ignore[arg-type]
    one = compiled(branch)
    for batch, length in ((1, 1), (3, 1), (2, 130), (300, 2)):
        x = torch.randn(batch, length, BLOCKS[name].d_model)
        with torch.inference_mode():
            found, states = one(x, None)
            assert_near(found, by_module(branch, x), weights)
        assert states == [()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 3, 8, 40_000])
def test_activations_are_accurate_to_float32(activation: Activation, count: int) -> None:
    x = torch.cat([torch.linspace(-30, 30, count // 2 + 1), torch.randn(count)])[:count]
    found, exact = activated(activation, x).double(), ACTIVATIONS[activation](x.double())
    bound = x.square() if activation == "relu2" else x.abs()
    assert bool(((found - exact).abs() <= 2e-7 * bound).all())
    above = x >= -3  # below, float32 knows exponents to fewer digits
    torch.testing.assert_close(found[above], exact[above], rtol=2e-6, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: Activation) -> None:
    x = torch.tensor([torch.nan, 1.0, -1.0])
    assert activated(activation, x).isnan().tolist() == [True, False, False]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    one = compiled(residual_of(replace(BLOCKS["all of it"], d_hidden=300), "mixed"))
    x, before, found = torch.randn(3, 80, D), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(one(x, None)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["all of it", "gelu", "relu2"])
def test_a_token_that_is_not_finite_spoils_itself_and_no_other(name: str) -> None:
    one = compiled(residual_of(BLOCKS[name], "int8 dynamic"))
    x = torch.randn(3, 20, D)
    x[1, 7, 3] = torch.nan
    finite = one(x, None)[0].isfinite()
    assert not finite[1, 7].any()
    finite[1, 7] = True
    assert finite.all()


def test_its_observer_is_told_where_the_time_goes() -> None:
    branch, told = residual_of(BLOCKS["all of it"]), list[Mapping[torch.nn.Module, float]]()
    compiled(branch)(torch.randn(2, 30, D), None, told.append)
    multipliers = {module for module in branch.modules() if isinstance(module, Linear)}
    assert set(told[0]) == multipliers | {branch.norm}
    assert len(multipliers) == 4
    assert min(told[0].values()) > 0


def activated(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """The kernels' activation of `x [n]`."""
    program = Program(x.shape[0], many=False)
    rows = program.stream.structure
    program.call("hidden", kernels.HiddenValues(rows, rows, rows, Hidden(x.shape[0], activation).structure))
    program.close()
    y = x[None, None].clone()
    program.calls.run(y, None, [], 0, 1, few=True)
    return y[0, 0]
