"""Experts against transformers' modules, and one component for all against one for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2MoeConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.routing import Routing
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of

D, HIDDEN, EXPERTS, TOP = 24, 19, 8, 3
BLOCK = Experts(d_model=D, d_hidden=HIDDEN, experts=EXPERTS, top_k=TOP)
GATED = replace(BLOCK, gated=True, activation="silu")
SIGMOID = Routing(scores="sigmoid", corrected=True)
SIZES: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": TOP}
GRANITE: dict[str, Any] = {**SIZES, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
JAMBA: dict[str, Any] = {**SIZES, "intermediate_size": HIDDEN, "num_experts": EXPERTS}
MOE: dict[str, Any] = {**SIZES, "moe_intermediate_size": HIDDEN, "num_experts": EXPERTS}
NEMOTRON: dict[str, Any] = {
    **SIZES,
    "moe_intermediate_size": HIDDEN,
    "n_routed_experts": EXPERTS,
    "moe_shared_expert_intermediate_size": 11,
}

Case = tuple[Experts, type[nn.Module], PreTrainedConfig]
"""A block, and transformers' module and config that it has to equal."""


def nemotron(*, latent: int | None = None, **routing: Any) -> Case:
    """Of Nemotron-H; `routing`: other fields than the default ones."""
    said: dict[str, Any] = {"n_group": routing.get("groups", 1), "topk_group": routing.get("chosen_groups", 1)}
    said |= {"norm_topk_prob": routing["normalised"], "routed_scaling_factor": routing.get("scaling", 1.0)}
    block = replace(
        BLOCK, activation="relu2", latent=latent, latent_bias=latent is not None,
        routing=replace(SIGMOID, eps=1e-20, **routing),
    )  # fmt: skip
    config = NemotronHConfig(**NEMOTRON, **said, moe_latent_size=latent, mlp_bias=latent is not None)
    return block, NemotronHMoE, config


def lfm2_moe(routing: Routing, **said: Any) -> Case:
    """Of LFM2's."""
    return replace(GATED, routing=routing), Lfm2MoeSparseMoeBlock, Lfm2MoeConfig(**MOE, **said)


def qwen3_next(*, normalised: bool) -> Case:
    """Of Qwen3-Next."""
    config = Qwen3NextConfig(**MOE, shared_expert_intermediate_size=11, norm_topk_prob=normalised)
    routing = Routing(scores="softmax", normalised=normalised)
    return replace(GATED, routing=routing), Qwen3NextSparseMoeBlock, config


CASES: dict[str, Case] = {
    "granite": (
        replace(GATED, gated=False, fused=True),
        GraniteMoeHybridMoE,
        GraniteMoeHybridConfig(**GRANITE, mamba_n_heads=1),
    ),
    "jamba": (replace(GATED, routing=Routing(scores="softmax")), JambaSparseMoeBlock, JambaConfig(**JAMBA)),
    "qwen3_next": qwen3_next(normalised=True),
    "qwen3_next, not normalised": qwen3_next(normalised=False),
    "nemotron_h": nemotron(normalised=True, scaling=2.5),
    "nemotron_h in groups": nemotron(normalised=True, groups=4, chosen_groups=2),
    "nemotron_h of plain scores": nemotron(normalised=False),
    "nemotron_h with latents": nemotron(normalised=True, latent=10),
    "lfm2_moe": lfm2_moe(
        replace(SIGMOID, normalised=True, eps=1e-6, scaling=1.5), use_expert_bias=True, routed_scaling_factor=1.5
    ),
    "lfm2_moe without bias": lfm2_moe(Routing(scores="sigmoid", normalised=True, eps=1e-6), use_expert_bias=False),
    "lfm2_moe, not normalised": lfm2_moe(SIGMOID, use_expert_bias=True, norm_topk_prob=False),
}

WORDS = {
    "router.weight": ("gate.weight", "router.weight"),
    "correction_bias": ("gate.e_score_correction_bias", "expert_bias"),
    "latent_in.weight": ("fc1_latent_proj.weight",),
    "latent_in.bias": ("fc1_latent_proj.bias",),
    "latent_out.weight": ("fc2_latent_proj.weight",),
    "latent_out.bias": ("fc2_latent_proj.bias",),
}
"""Our names of what is not an expert's, and transformers'."""


def output(block: Experts, tensors: Mapping[str, Tensor], u: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixing_of(block, tensors)(u)[0]
    return found


def loaded(case: Case, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Transformers' module with these tensors, and zeros for the shared expert."""
    block, kind, config = case
    module = kind(config)
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for tensor in held.values():
            tensor.zero_()
        for ours, words in WORDS.items():
            if f"{AT}.{ours}" in tensors:
                (name,) = (word for word in words if word in held)
                held[name].copy_(tensors[f"{AT}.{ours}"])
        for e in range(block.experts):
            inward = torch.cat([tensors[f"{AT}.experts.{e}.{leaf}.weight"] for leaf, _ in block.hidden.inward])
            fused = "experts.gate_up_proj" if "experts.gate_up_proj" in held else "experts.up_proj"
            held[fused][e].copy_(inward)
            held["experts.down_proj"][e].copy_(tensors[f"{AT}.experts.{e}.{block.hidden.outward}.weight"])
    return module


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_it_is_transformers_module(name: str) -> None:
    block = CASES[name][0]
    tensors = tensors_of(block, 1)
    module, u = loaded(CASES[name], tensors), torch.randn(2, 31, D)
    with torch.no_grad():
        assert_near(output(block, tensors, u), module(u))


def test_the_shared_expert_beside_them_is_a_feed_forward_with_a_token_gate() -> None:
    routed = CASES["qwen3_next"][0]
    shared = FeedForward(
        d_model=D, d_hidden=11, activation="silu", gated=True, token_gate=True,
        names=(
            *((leaf, f"shared_expert.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")),
            ("token_gate", "shared_expert_gate"),
        ),
    )  # fmt: skip
    tensors, beside = tensors_of(routed, 1), tensors_of(shared, 2)
    module, u = loaded(CASES["qwen3_next"], tensors), torch.randn(2, 31, D)
    module.load_state_dict({name.removeprefix(f"{AT}."): t for name, t in beside.items()}, strict=False)
    with torch.no_grad():
        assert_near(output(routed, tensors, u) + mixing_of(shared, beside)(u)[0], module(u))


def joined(block: Experts, tensors: Mapping[str, Tensor]) -> tuple[Experts, dict[str, Tensor]]:
    """The block with one component for each kind of projection, and its tensors."""
    together = replace(block, together=True)
    found = {}
    for parameter in together.parameters(AT, 0):
        leaf = parameter.name.removeprefix(f"{AT}.experts.")
        each = [f"{AT}.experts.{e}.{leaf}" for e in range(block.experts)]
        found[parameter.name] = (
            torch.cat([tensors[name] for name in each]) if each[0] in tensors else tensors[parameter.name]
        )
    return together, found


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12),
    st.sampled_from(["plain", "gated", "fused"]), st.booleans(),
)  # fmt: skip
def test_one_component_for_all_experts_gives_what_one_for_each_does(
    d: int, hidden: int, experts: int, top_k: int, length: int, form: str, latent: bool
) -> None:
    block = Experts(
        d_model=d, d_hidden=hidden, experts=experts, top_k=top_k, gated=form == "gated", fused=form == "fused",
        latent=3 if latent else None,
    )  # fmt: skip
    tensors, u = tensors_of(block, 1), torch.randn(2, length, d)
    found, expected = output(*joined(block, tensors), u), output(block, tensors, u)
    # where rows begin in memory may change the last bit of a product
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_window_is_the_same_whatever_is_beside_it() -> None:
    tensors, u = tensors_of(GATED, 1), torch.randn(5, 12, D)
    alone = output(GATED, tensors, u[2:3])
    torch.testing.assert_close(output(GATED, tensors, u)[2:3], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(GATED, tensors, u.flip(0))[2:3], alone, rtol=1e-5, atol=1e-6)


def test_token_by_token_is_the_whole() -> None:
    mixing, u = mixing_of(GATED, tensors_of(GATED, 1)), torch.randn(2, 6, D)
    with torch.no_grad():
        steps = [mixing(u[:, t : t + 1], ())[0] for t in range(6)]
        assert_near(torch.cat(steps, dim=1), mixing(u)[0])


def test_experts_that_no_token_chose_are_not_computed() -> None:
    block = replace(GATED, top_k=1)
    mixing, called = mixing_of(block, tensors_of(block, 1)), set[str]()
    for name, module in mixing.named_modules():
        if name.startswith("outward.projections."):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        mixing(torch.randn(1, 1, D))
    assert len(called) == 1


def test_more_chosen_than_there_are_is_all() -> None:
    few = replace(GATED, experts=2, top_k=5)
    tensors, u = tensors_of(few, 1), torch.randn(2, 6, D)
    assert torch.equal(output(few, tensors, u), output(replace(few, top_k=2), tensors, u))


@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_differences_of_the_output(together: bool) -> None:
    block = CASES["nemotron_h with latents"][0]
    tensors = tensors_of(block, 1)
    if together:
        block, tensors = joined(block, tensors)
    mixing, u = mixing_of(block, tensors), torch.randn(2, 31, D)
    weights = [p for p in mixing.parameters() if p.dim() == 2]
    for weight in weights:
        weight.requires_grad_()
    mixing(u)[0].square().mean().backward()
    ends = []
    starts, towards = [w.detach().clone() for w in weights], [torch.randn_like(w) / w.shape[1] for w in weights]
    slope = sum(float((w.grad.double() * t).sum()) for w, t in zip(weights, towards, strict=True) if w.grad is not None)
    for step in (3e-4, -3e-4):  # so little that no token changes its experts
        with torch.no_grad():
            for weight, start, toward in zip(weights, starts, towards, strict=True):
                weight.copy_(start + step * toward)
            ends.append(float(mixing(u)[0].double().square().mean()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 6e-4, rel=2e-2)


def test_the_correction_bias_chooses_and_does_not_weigh() -> None:
    routing = replace(SIGMOID, normalised=False)
    logits, bias = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([5.0, 0.0, 0.0, 3.0])
    weights, chosen = routing(logits, bias, 2)
    assert chosen.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, logits[:, [0, 3]].sigmoid())


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    routing = Routing(scores="sigmoid", groups=3, chosen_groups=1)
    chosen = routing(torch.tensor([[9.0, -9.0, 3.0, 3.0, 1.0, 2.0]]), None, 2)[1]  # the best one is alone in its group
    assert sorted(chosen[0].tolist()) == [2, 3]
