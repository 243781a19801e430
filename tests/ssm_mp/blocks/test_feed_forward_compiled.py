"""Activations of a feed-forward as the kernels compute them, and the time of its components."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from ssm_mp.blocks.hidden import ACTIVATIONS, Activation, Hidden
from ssm_mp.kernels import feed_forward as kernels
from ssm_mp.kernels.compiler import library
from ssm_mp.modules.linear import Linear
from ssm_mp.programs.program import Program
from tests.ssm_mp.blocks.compiled_cases import FEED_FORWARD
from tests.ssm_mp.blocks.compiling import branch_of, compiled

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")


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


def test_its_observer_is_told_where_the_time_goes() -> None:
    block, told = FEED_FORWARD["all of it"], list[Mapping[torch.nn.Module, float]]()
    branch = branch_of(block)
    compiled(branch)(torch.randn(2, 30, block.d_model), None, told.append)
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
