"""Attention against transformers' modules, against its own definition, and token by token against the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.bamba import modeling_bamba as bamba
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from ssm_mp.blocks.attention import Attention, attention, attention_reference
from ssm_mp.blocks.block import State
from ssm_mp.blocks.rotary import LinearStretch, Llama3Stretch, Rotary, Stretch, YarnStretch, turned
from ssm_mp.modules.norm import NormForm
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of

D, HEADS, KV_HEADS, HEAD = 48, 6, 3, 12
SIZES: dict[str, Any] = {"hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
BLOCK = Attention(d_model=D, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD)
PLAIN = replace(BLOCK, head_dim=D // HEADS)


def rope(theta: float, share: float = 1.0, **more: Any) -> dict[str, Any]:
    """What a config says of its rotary embeddings; `share` of a head is turned."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share, **more}}


STRETCHES: dict[str, tuple[dict[str, Any], Stretch]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearStretch(3.0)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        Llama3Stretch(8.0, 1.0, 4.0, 64),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        YarnStretch(4.0, 256),
    ),
    "yarn with its own numbers": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 0.75, "truncate": False},
        YarnStretch(4.0, 256, 16.0, 2.0, 0.75, truncate=False),
    ),
}  # fmt: skip

Case = tuple[Attention, type[nn.Module], PreTrainedConfig, type[nn.Module] | None]


def cases() -> dict[str, Case]:
    """A block, and transformers' module, config and rotary embedding that it has to equal."""
    norm = NormForm(1e-5)
    gated = replace(BLOCK, output_gate=True, qk_norm=NormForm(1e-6, one_plus=True), rotary=Rotary(4, 1e7))
    own_head: dict[str, Any] = {**SIZES, "head_dim": HEAD}
    lfm2_names = (("o_proj", "out_proj"), ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm"))
    found: dict[str, Case] = {
        "bamba": (
            replace(BLOCK, rotary=Rotary(6, 5e3)),
            bamba.BambaAttention,
            BambaConfig(**own_head, mamba_n_heads=1, **rope(5e3, 0.5)),
            bamba.BambaRotaryEmbedding,
        ),
        "bamba with biases": (
            replace(PLAIN, n_kv_heads=1, qkv_bias=True, o_bias=True, rotary=Rotary(4, 1e4)),
            bamba.BambaAttention,
            BambaConfig(**{**SIZES, "num_key_value_heads": 1}, attention_bias=True, mamba_n_heads=1, **rope(1e4, 0.5)),
            bamba.BambaRotaryEmbedding,
        ),
        "granite": (
            replace(PLAIN, scale=0.3),
            granite.GraniteMoeHybridAttention,
            GraniteMoeHybridConfig(**SIZES, mamba_n_heads=1, attention_multiplier=0.3),
            None,
        ),
        "granite with positions": (
            replace(BLOCK, d_model=36, head_dim=6, scale=0.3, rotary=Rotary(6, 1e4)),
            granite.GraniteMoeHybridAttention,
            GraniteMoeHybridConfig(
                **{**SIZES, "hidden_size": 36}, mamba_n_heads=1, attention_multiplier=0.3, **rope(1e4)
            ),
            granite.GraniteMoeHybridRotaryEmbedding,
        ),
        "falcon_h1": (
            replace(BLOCK, key_multiplier=0.4, rotary=Rotary(HEAD, 1e11)),
            falcon_h1.FalconH1Attention,
            FalconH1Config(**own_head, key_multiplier=0.4, **rope(1e11)),
            falcon_h1.FalconH1RotaryEmbedding,
        ),
        "nemotron_h": (BLOCK, nemotron_h.NemotronHAttention, NemotronHConfig(**own_head), None),
        "jamba": (
            replace(PLAIN, n_kv_heads=HEADS),
            jamba.JambaAttention,
            JambaConfig(**{**SIZES, "num_key_value_heads": HEADS}),
            None,
        ),
        "lfm2": (
            replace(BLOCK, d_model=36, head_dim=6, qk_norm=norm, rotary=Rotary(6, 1e6), names=lfm2_names),
            lfm2.Lfm2Attention,
            Lfm2Config(**{**SIZES, "hidden_size": 36}, norm_eps=1e-5, **rope(1e6)),
            lfm2.Lfm2RotaryEmbedding,
        ),
        "qwen3_next": (
            gated,
            qwen3_next.Qwen3NextAttention,
            Qwen3NextConfig(**own_head, **rope(1e7, 1 / 3)),
            qwen3_next.Qwen3NextRotaryEmbedding,
        ),
        "qwen3_5": (
            replace(gated, qkv_bias=True, o_bias=True),
            qwen3_5.Qwen3_5Attention,
            Qwen3_5TextConfig(**own_head, attention_bias=True, **rope(1e7, 1 / 3, mrope_section=[1, 1, 0])),
            qwen3_5.Qwen3_5TextRotaryEmbedding,
        ),
    }
    for name, (said, stretch) in STRETCHES.items():
        rotary = Rotary(HEAD, 1e4, stretch)
        config = FalconH1Config(**own_head, max_position_embeddings=512, **rope(1e4, **said))
        found[name] = (
            replace(BLOCK, rotary=rotary), falcon_h1.FalconH1Attention, config, falcon_h1.FalconH1RotaryEmbedding
        )  # fmt: skip
    return found


def theirs(
    module: type[nn.Module],
    config: PreTrainedConfig,
    rotary: type[nn.Module] | None,
    tensors: Mapping[str, Tensor],
    u: Tensor,
) -> Tensor:
    """What transformers' module gives for inputs `u [b, l, d]`."""
    config._attn_implementation = "sdpa"
    made = module(config, layer_idx=0)
    made.load_state_dict({name.removeprefix(f"{AT}."): tensor for name, tensor in tensors.items()})
    waves = None if rotary is None else rotary(config)(u, torch.arange(u.shape[1])[None])
    more = {} if module in (nemotron_h.NemotronHAttention, jamba.JambaAttention) else {"position_embeddings": waves}
    with torch.no_grad():
        out: Tensor = made(u, attention_mask=None, **more)[0]
    return out


def assert_near(found: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("name", cases())
def test_it_is_transformers_module(name: str) -> None:
    block, module, config, rotary = cases()[name]
    tensors = tensors_of(block, 3)
    u = torch.randn(2, 150, block.d_model)
    with torch.no_grad():
        found = mixing_of(block, tensors)(u)[0]
    assert_near(found, theirs(module, config, rotary, tensors, u))


EVERYTHING = replace(
    BLOCK, output_gate=True, qk_norm=NormForm(1e-6), rotary=Rotary(8, 1e4), key_multiplier=0.7, qkv_bias=True
)


@pytest.mark.parametrize("block", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (0, 4, 9), (0, 8, 9), (0, 1, 9)])
def test_parts_of_a_window_are_the_whole(block: Attention, cuts: tuple[int, ...]) -> None:
    mixing = mixing_of(block, tensors_of(block, 4))
    u = torch.randn(2, cuts[-1], block.d_model)
    with torch.no_grad():
        whole, last = mixing(u)
        parts: list[Tensor] = []
        state: State | None = None
        for start, end in pairwise(cuts):
            given_state = None if state is None else tuple(x.clone() for x in state)
            part, after = mixing(u[:, start:end], state)
            if state is not None and given_state is not None:  # the state before is as it was
                assert all(torch.equal(x, y) for x, y in zip(state, given_state, strict=True))
            parts.append(part)
            state = after
    assert_near(torch.cat(parts, dim=1), whole)
    assert state is not None
    for found, expected in zip(state, last, strict=True):
        assert found.shape == (2, block.n_kv_heads, cuts[-1], block.head_dim)
        assert_near(found, expected)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 40), st.integers(1, 9)
)
def test_the_fused_call_is_the_definition(
    batch: int, kv_heads: int, group: int, length: int, before: int, head: int
) -> None:
    q = torch.randn(batch, kv_heads * group, length, head)
    k, v = torch.randn(2, batch, kv_heads, before + length, head)
    torch.testing.assert_close(attention(q, k, v, 0.4), attention_reference(q, k, v, 0.4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "before"), [(6, 0), (1, 5), (4, 3)])
def test_gradients_are_those_of_the_definition(length: int, before: int) -> None:
    found = []
    for scan in (attention, attention_reference):
        torch.manual_seed(0)
        q = torch.randn(2, 6, length, 5, requires_grad=True)
        k, v = (torch.randn(2, 3, before + length, 5, requires_grad=True) for _ in range(2))
        y = scan(q, k, v, 0.4)
        found.append(torch.autograd.grad((y * torch.randn_like(y)).sum(), (q, k, v)))
    for ours, reference in zip(*found, strict=True):
        assert_near(ours, reference)


def test_gradients_of_a_block_are_differences_of_its_output() -> None:
    block = replace(EVERYTHING, d_model=6, n_heads=2, n_kv_heads=1, head_dim=4, rotary=Rotary(4, 1e2))
    mixing = mixing_of(block, tensors_of(block, 5))
    parameter = next(mixing.k_proj.parameters())  # type: ignore[union-attr]  # nn.Module attributes are untyped
    parameter.requires_grad_()
    u, towards = torch.randn(1, 5, 6), torch.randn(4, 6)
    (mixing(u)[0].square().sum()).backward()
    slope = float((parameter.grad * towards).sum())  # type: ignore[operator]
    ends, start = [], parameter.detach().clone()
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            parameter.copy_(start + step * towards)
            ends.append(float(mixing(u)[0].double().square().sum()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)


def test_a_token_does_not_know_what_comes_after_it() -> None:
    mixing = mixing_of(EVERYTHING, tensors_of(EVERYTHING, 6))
    u = torch.randn(1, 9, D)
    other = torch.cat((u[:, :5], torch.randn(1, 4, D)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(mixing(u)[0][:, :5], mixing(other)[0][:, :5])


def test_turned_numbers_are_only_the_first() -> None:
    waves = Rotary(4, 1e4).waves(7, 3, torch.device("cpu"))
    x = torch.randn(2, 2, 3, 10)
    found = turned(x, *waves)
    assert torch.equal(found[..., 4:], x[..., 4:])
    assert not torch.allclose(found[..., :4], x[..., :4])
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
