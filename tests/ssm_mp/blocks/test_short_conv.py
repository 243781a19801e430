"""The gated short convolution against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from ssm_mp.blocks.short_conv import ShortConv
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of
from tests.ssm_mp.blocks.near import require_near


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("d", "kernel", "b", "length"), [(24, 3, 2, 11), (37, 5, 1, 2), (16, 1, 3, 4), (8, 3, 1, 1)])
@torch.no_grad()
def test_it_computes_what_lfm2_does(d: int, kernel: int, b: int, length: int, with_bias: bool) -> None:
    block = ShortConv(d_model=d, d_conv=kernel, with_bias=with_bias)
    tensors = tensors_of(block, seed=kernel)
    config = Lfm2Config(
        hidden_size=d, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=kernel, conv_bias=with_bias
    )
    theirs = Lfm2ShortConv(config, 0)
    theirs.load_state_dict({name.removeprefix(f"{AT}."): tensor for name, tensor in tensors.items()})
    u = torch.randn(b, length, d)
    require_near(mixing_of(block, tensors)(u)[0], theirs(u))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [1, 8]])
@torch.no_grad()
def test_parts_one_after_another_equal_the_whole(kernel: int, cuts: list[int]) -> None:
    block = ShortConv(d_model=20, d_conv=kernel, with_bias=True)
    mixing = mixing_of(block, tensors_of(block, seed=0))
    u, state, outputs = torch.randn(2, 9, 20), None, []
    whole, end = mixing(u)
    for part in u.split(cuts, dim=1):
        y, state = mixing(part, state)
        outputs.append(y)
    require_near(torch.cat(outputs, dim=1), whole)
    assert state is not None
    torch.testing.assert_close(state[0], end[0])


def test_gradients_pass_through_it() -> None:
    block = ShortConv(d_model=8, d_conv=3)
    mixing = mixing_of(block, tensors_of(block, seed=0))
    u = torch.randn(2, 5, 8, requires_grad=True)
    y, _ = mixing(u)
    (found,) = torch.autograd.grad(y.square().sum(), u)
    step = torch.zeros_like(u)
    step[1, 2, 3] = 1e-2
    with torch.no_grad():
        ahead, behind = (mixing(u + sign * step)[0].square().sum() for sign in (1, -1))
    assert found[1, 2, 3] == pytest.approx(float((ahead - behind) / 2e-2), rel=1e-2)
