"""The Mamba-1 mixer, plain and with its inner norms, against transformers' three."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconMambaConfig, JambaConfig, MambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from ssm_mp.blocks.block import State
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.kernels.scan import selective_scan, selective_scan_reference, selective_scan_steps
from ssm_mp.modules.norm import NormForm
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of
from tests.ssm_mp.blocks.near import require_near

JAMBA_NAMES = (("dt_norm", "dt_layernorm"), ("B_norm", "b_layernorm"), ("C_norm", "c_layernorm"))
SCANS = [selective_scan, selective_scan_reference, selective_scan_steps]


def _mamba(block: Mamba1) -> nn.Module:
    module: nn.Module = MambaMixer(_config(MambaConfig, block), 0)
    return module


def _falcon_mamba(block: Mamba1) -> nn.Module:
    # the model's own eps is another one
    config = _config(FalconMambaConfig, block, mixer_rms_eps=block.weightless_eps, layer_norm_epsilon=0.5)
    module: nn.Module = FalconMambaMixer(config, 0, initialize_mixer_weights=False)
    return module


def _config(make: Callable[..., Any], block: Mamba1, **more: object) -> Any:
    return make(
        hidden_size=block.d_model, intermediate_size=block.d_inner, expand=block.d_inner // block.d_model,
        state_size=block.d_state, time_step_rank=block.dt_rank, conv_kernel=block.d_conv, num_hidden_layers=1,
        use_bias=block.projection_bias, use_conv_bias=block.conv_bias, **more,
    )  # fmt: skip


def _jamba(block: Mamba1) -> nn.Module:
    assert block.inner_norms is not None
    config = JambaConfig(
        hidden_size=block.d_model, mamba_expand=block.d_inner // block.d_model, mamba_d_state=block.d_state,
        mamba_dt_rank=block.dt_rank, mamba_d_conv=block.d_conv, rms_norm_eps=block.inner_norms.eps,
        mamba_proj_bias=block.projection_bias, mamba_conv_bias=block.conv_bias, num_hidden_layers=1,
    )  # fmt: skip
    module: nn.Module = JambaMambaMixer(config, 0)
    return module


@dataclass(frozen=True)
class Kind:
    """A block, and transformers' module for such blocks."""

    block: Mamba1
    make: Callable[[Mamba1], nn.Module]


PLAIN = Mamba1(d_model=20, d_inner=40, d_state=5, dt_rank=3, d_conv=4)
KINDS = {
    "mamba": Kind(PLAIN, _mamba),
    # eps so large that another one in its place is seen
    "falcon_mamba": Kind(replace(PLAIN, weightless_eps=1e-2), _falcon_mamba),
    "jamba": Kind(replace(PLAIN, inner_norms=NormForm(1e-2), names=JAMBA_NAMES), _jamba),
}
VARIANTS: dict[str, Callable[[Mamba1], Mamba1]] = {
    "plain": lambda block: block,
    "biases the other way": lambda block: replace(block, projection_bias=True, conv_bias=False, d_conv=2),
    "sixteen states": lambda block: replace(block, d_state=16, d_model=16, d_inner=48, dt_rank=1),
}


def _theirs(kind: Kind, block: Mamba1, tensors: dict[str, Tensor]) -> nn.Module:
    module = kind.make(block).eval()
    module.load_state_dict({name.removeprefix(f"{AT}."): tensor for name, tensor in tensors.items()})
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("b", "length"), [(2, 13), (1, 1), (3, 2)])
@torch.no_grad()
def test_it_computes_what_transformers_does(kind: str, variant: str, b: int, length: int) -> None:
    block = VARIANTS[variant](KINDS[kind].block)
    tensors = tensors_of(block, seed=length)
    u = torch.randn(b, length, block.d_model)
    expected = _theirs(KINDS[kind], block, tensors)(u)
    for scan in SCANS:
        require_near(mixing_of(block, tensors, scan=scan)(u)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [6, 1, 1, 1], [1, 8]])
@torch.no_grad()
def test_parts_one_after_another_are_what_transformers_computes_of_the_whole(kind: str, cuts: list[int]) -> None:
    block = KINDS[kind].block
    tensors = tensors_of(block, seed=0)
    mixing = mixing_of(block, tensors)
    state: State | None = None
    u, outputs = torch.randn(2, 9, block.d_model), []
    for part in u.split(cuts, dim=1):
        held = copy.deepcopy(state)
        y, after = mixing(part, state)
        assert all(torch.equal(*pair) for pair in zip(held or (), state or (), strict=True)), "the state was changed"
        state = after
        outputs.append(y)
    require_near(torch.cat(outputs, dim=1), _theirs(KINDS[kind], block, tensors)(u))
    end = mixing(u)[1]
    assert state is not None
    for ours, expected in zip(state, end, strict=True):
        require_near(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers(kind: str) -> None:
    block = KINDS[kind].block
    tensors = tensors_of(block, seed=0)
    mixing, theirs = mixing_of(block, tensors, scan=Mamba1.differentiable), _theirs(KINDS[kind], block, tensors)

    def ours(x: Tensor) -> Tensor:
        y: Tensor = mixing(x)[0]
        return y

    x = torch.randn(2, 7, block.d_model, requires_grad=True)
    target = torch.randn(2, 7, block.d_model)
    found, expected = (torch.autograd.grad((compute(x) * target).sum(), x)[0] for compute in (ours, theirs))
    require_near(found, expected)
