"""The gated delta rule mixer against transformers' two, whose projections differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from ssm_mp.blocks.block import State
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.kernels.delta import delta_rule_chunked, delta_rule_reference
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of
from tests.ssm_mp.blocks.near import require_near

SHAPES = {
    "as many value heads as key heads": DeltaRule(
        d_model=24, key_heads=2, value_heads=2, key_dim=16, value_dim=16, d_conv=4, norm_eps=1e-6
    ),
    "odd sizes, three value heads a key head": DeltaRule(
        d_model=20, key_heads=3, value_heads=9, key_dim=5, value_dim=7, d_conv=3, norm_eps=1e-3
    ),
    "values wider than a block of columns": DeltaRule(
        d_model=16, key_heads=1, value_heads=2, key_dim=33, value_dim=50, d_conv=2, norm_eps=1e-5
    ),
}
MODULES = {True: (Qwen3NextConfig, Qwen3NextGatedDeltaNet), False: (Qwen3_5TextConfig, Qwen3_5GatedDeltaNet)}


def _theirs(block: DeltaRule, tensors: dict[str, Tensor]) -> nn.Module:
    make_config, make_module = MODULES[block.fused]
    config = make_config(
        hidden_size=block.d_model, num_hidden_layers=1, layer_types=["linear_attention"], hidden_act="silu",
        linear_num_key_heads=block.key_heads, linear_num_value_heads=block.value_heads,
        linear_key_head_dim=block.key_dim, linear_value_head_dim=block.value_dim,
        linear_conv_kernel_dim=block.d_conv, rms_norm_eps=block.norm_eps,
    )  # fmt: skip
    module: nn.Module = make_module(config, 0)
    module.load_state_dict({name.removeprefix(f"{AT}."): tensor for name, tensor in tensors.items()})
    return module


@pytest.mark.parametrize("fused", [False, True], ids=["qwen3.5", "qwen3-next"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("b", "length"), [(2, 70), (1, 1), (3, 5)])
@torch.no_grad()
def test_it_computes_what_transformers_does(b: int, length: int, shape: str, fused: bool) -> None:
    block = replace(SHAPES[shape], fused=fused)
    tensors = tensors_of(block, seed=length)
    u = torch.randn(b, length, block.d_model)
    expected = _theirs(block, tensors)(u)
    require_near(mixing_of(block, tensors)(u)[0], expected)
    require_near(mixing_of(block, tensors, scan=delta_rule_reference)(u)[0], expected)
    require_near(mixing_of(block, tensors, scan=delta_rule_chunked)(u)[0], expected)


@pytest.mark.parametrize("fused", [False, True], ids=["qwen3.5", "qwen3-next"])
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [8, 1], [1, 3, 5]])
@torch.no_grad()
def test_parts_one_after_another_equal_the_whole(cuts: list[int], fused: bool) -> None:
    block = replace(SHAPES["odd sizes, three value heads a key head"], fused=fused)
    mixing = mixing_of(block, tensors_of(block, seed=0))
    state: State | None = None
    u, outputs = torch.randn(2, 9, block.d_model), []
    whole, end = mixing(u)
    for part in u.split(cuts, dim=1):
        held = [] if state is None else [tensor.clone() for tensor in state]
        y, after = mixing(part, state)
        assert all(torch.equal(*pair) for pair in zip(held, state or (), strict=True)), "the state before was changed"
        state = after
        outputs.append(y)
    require_near(torch.cat(outputs, dim=1), whole)
    assert state is not None
    for ours, expected in zip(state, end, strict=True):
        assert ours.dtype == torch.float32
        require_near(ours, expected)


@pytest.mark.parametrize("fused", [False, True], ids=["qwen3.5", "qwen3-next"])
def test_gradients_are_those_of_transformers(fused: bool) -> None:
    block = replace(SHAPES["odd sizes, three value heads a key head"], fused=fused)
    tensors = tensors_of(block, seed=0)
    ours, theirs = mixing_of(block, tensors), _theirs(block, tensors)
    for parameter in ours.parameters():
        parameter.requires_grad_()
    u, target = torch.randn(2, 70, block.d_model), torch.randn(2, 70, block.d_model)
    (ours(u)[0] * target).sum().backward()
    (theirs(u) * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = dict(zip(_leaves(block), (parameter.grad for parameter in ours.parameters()), strict=True))
    for name, gradient in gradients.items():
        value = found[name]
        assert gradient is not None and value is not None  # noqa: PT018, types only
        assert (value - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def _leaves(block: DeltaRule) -> list[str]:
    """Names of the parameters in the order of the module's attributes."""
    names = [parameter.name.removeprefix(f"{AT}.") for parameter in block.parameters(AT, 0)]
    assert len(set(names)) == len(names)
    return names
