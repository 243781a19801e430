"""Feed-forwards against transformers' modules and against their formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.models.bamba.modeling_bamba import BambaMLP
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMLP
from transformers.models.jamba.modeling_jamba import JambaMLP
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextMLP

from ssm_mp.blocks.feed_forward import FeedForward
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of

D, HIDDEN = 24, 37
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": HIDDEN}
GATED = FeedForward(d_model=D, d_hidden=HIDDEN, activation="silu", gated=True)
LFM2_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))

CASES: dict[str, tuple[FeedForward, type[nn.Module], PreTrainedConfig]] = {
    "bamba": (
        replace(GATED, projection_bias=True), BambaMLP, BambaConfig(**SIZES, mlp_bias=True, mamba_n_heads=1)
    ),
    "jamba": (GATED, JambaMLP, JambaConfig(**SIZES)),
    "granite": (
        replace(GATED, gated=False, fused=True),
        GraniteMoeHybridMLP,
        GraniteMoeHybridConfig(hidden_size=D, shared_intermediate_size=HIDDEN, mamba_n_heads=1),
    ),
    "falcon_h1": (
        replace(GATED, projection_bias=True, gate_multiplier=0.6, down_multiplier=1.7),
        FalconH1MLP,
        FalconH1Config(**SIZES, mlp_bias=True, mlp_multipliers=[0.6, 1.7]),
    ),
    "nemotron_h": (
        replace(GATED, activation="relu2", gated=False, projection_bias=True),
        NemotronHMLP,
        NemotronHConfig(**SIZES, mlp_bias=True),
    ),
    "nemotron_h of tanh": (
        replace(GATED, activation="gelu_tanh", gated=False),
        NemotronHMLP,
        NemotronHConfig(**SIZES, mlp_hidden_act="gelu_pytorch_tanh"),
    ),
    "lfm2": (replace(GATED, names=LFM2_NAMES), Lfm2MLP, Lfm2Config(**SIZES, block_auto_adjust_ff_dim=False)),
    "qwen3_next": (GATED, Qwen3NextMLP, Qwen3NextConfig(**SIZES)),
}  # fmt: skip


def output(block: FeedForward, tensors: dict[str, Tensor], u: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixing_of(block, tensors)(u)[0]
    return found


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_it_is_transformers_module(name: str) -> None:
    block, kind, config = CASES[name]
    tensors = tensors_of(block, 1)
    module = kind(config)
    module.load_state_dict({name.removeprefix(f"{AT}."): tensor for name, tensor in tensors.items()})
    u = torch.randn(2, 5, D)
    with torch.no_grad():
        assert_near(output(block, tensors, u), module(u))


def test_without_options_it_is_gelu_between_two_projections() -> None:
    block = FeedForward(d_model=D, d_hidden=HIDDEN)
    tensors, u = tensors_of(block, 2), torch.randn(2, 5, D)
    assert list(tensors) == [f"{AT}.up_proj.weight", f"{AT}.down_proj.weight"]
    up, down = tensors.values()
    assert_near(output(block, tensors, u), F.gelu(u @ up.t()) @ down.t())


def test_a_token_gate_is_one_factor_a_token() -> None:
    block = replace(GATED, token_gate=True, names=(("token_gate", "shared_expert_gate"),))
    tensors, u = tensors_of(block, 3), torch.randn(2, 5, D)
    gate = tensors.pop(f"{AT}.shared_expert_gate.weight")
    assert gate.shape == (1, D)
    assert [p.kind for p in block.parameters(AT, 0)][-1] == "token_gate"
    ungated = output(GATED, tensors, u)
    found = output(block, {**tensors, f"{AT}.shared_expert_gate.weight": gate}, u)
    assert_near(found, torch.sigmoid(u @ gate.t()) * ungated)


def test_gradients_pass_through() -> None:
    block = replace(GATED, token_gate=True, gate_multiplier=0.5)
    mixing = mixing_of(block, tensors_of(block, 4))
    for parameter in mixing.parameters():
        parameter.requires_grad_()
    mixing(torch.randn(2, 5, D))[0].square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in mixing.parameters())
