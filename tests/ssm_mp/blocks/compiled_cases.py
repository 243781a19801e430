"""Blocks of every kind that the kernels compute, as the tests of all of them take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.hidden import ACTIVATIONS
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.rotary import LinearStretch, Llama3Stretch, Rotary, YarnStretch
from ssm_mp.blocks.routing import Routing
from ssm_mp.blocks.shared_step import SharedStep
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.modules.norm import NormForm
from tests.ssm_mp.blocks.test_delta_rule import SHAPES as DELTA_SHAPES
from tests.ssm_mp.blocks.test_mamba2 import BLOCKS as MAMBA2

TOGETHER = ((3, 64), (3, 257), (3, 516), (3, 700))
"""Sequences and tokens; several threads take more of them in a pass than one does."""


@dataclass(frozen=True)
class Case:
    """Blocks of one kind.

    blocks: every way to compute them, by what is special to each.
    one: that with most in it, for what need not be said of each; shared: those whose work threads share in other ways.
    together: sequences and tokens of which threads give the very numbers that one alone does.
    spoilt: tokens of sequences of which one in the middle is not finite; all later tokens have to see it.
    scan: whether the block can be told to compute otherwise.
    """

    blocks: Mapping[str, Block]
    one: Block
    shared: Sequence[Block]
    together: Sequence[tuple[int, int]] = TOGETHER
    spoilt: Sequence[int] = (2, 6)
    scan: bool = True


_ATTENTION = Attention(d_model=24, n_heads=6, n_kv_heads=3, head_dim=10)
_ALL_OF_ATTENTION = replace(
    _ATTENTION, output_gate=True, qk_norm=NormForm(1e-6, one_plus=True), rotary=Rotary(8, 1e4), key_multiplier=0.7,
    qkv_bias=True, o_bias=True, scale=0.4,
)  # fmt: skip
ATTENTION: Mapping[str, Attention] = {
    "plain": _ATTENTION,
    "one head of keys": replace(_ATTENTION, n_heads=19, n_kv_heads=1, head_dim=7),
    "heads of their own": replace(_ATTENTION, n_kv_heads=6, rotary=Rotary(10, 1e5)),
    "wide heads": replace(_ATTENTION, n_heads=4, n_kv_heads=1, head_dim=80, rotary=Rotary(32, 1e4)),
    "biases": replace(_ATTENTION, qkv_bias=True, o_bias=True),
    "norms": replace(_ATTENTION, qk_norm=NormForm(1e-5), scale=0.3),
    "gate": replace(_ATTENTION, output_gate=True),
    "all of it": _ALL_OF_ATTENTION,
    "linear": replace(_ATTENTION, rotary=Rotary(6, 1e4, LinearStretch(3.0))),
    "llama3": replace(_ATTENTION, rotary=Rotary(10, 1e4, Llama3Stretch(8.0, 1.0, 4.0, 64))),
    "yarn": replace(_ATTENTION, rotary=Rotary(10, 1e4, YarnStretch(4.0, 256))),
}

_MAMBA1 = Mamba1(d_model=24, d_inner=48, d_state=16, dt_rank=3, d_conv=4)
MAMBA1: Mapping[str, Mamba1] = {
    "plain": _MAMBA1,
    "sizes that fill no vector": replace(_MAMBA1, d_model=21, d_inner=37, d_state=5, d_conv=3, projection_bias=True),
    "one tap": replace(_MAMBA1, d_conv=1, conv_bias=False),
    "norms": replace(_MAMBA1, inner_norms=NormForm(1e-2), projection_bias=True),
    "weightless norms": replace(_MAMBA1, weightless_eps=1e-2),
}

_DELTA_RULE = DELTA_SHAPES["odd sizes, three value heads a key head"]
DELTA_RULE: Mapping[str, DeltaRule] = {
    **DELTA_SHAPES,
    "by key head": replace(_DELTA_RULE, fused=True),
    "by key head, as many value heads": replace(DELTA_SHAPES["as many value heads as key heads"], fused=True),
    "more values than are taken at once": replace(_DELTA_RULE, key_heads=1, value_heads=1, value_dim=261),
}

_SHARED_STEP = SharedStep(d_model=24, d_inner=48, d_state=16, d_conv=4)
SHARED_STEP: Mapping[str, SharedStep] = {
    "small": _SHARED_STEP,
    "sizes that fill no vector": replace(_SHARED_STEP, d_model=21, d_inner=37, d_state=5, d_conv=3),
    "one tap, a state beyond a vector": replace(_SHARED_STEP, d_inner=16, d_state=35, d_conv=1),
}

SHORT_CONV: Mapping[str, ShortConv] = {
    "plain": ShortConv(d_model=21, d_conv=3),
    "biases": ShortConv(d_model=32, d_conv=4, with_bias=True),
    "one tap": ShortConv(d_model=12, d_conv=1),
}

_FORWARD = FeedForward(d_model=24, d_hidden=37)
_GATED = replace(_FORWARD, gated=True, activation="silu")
_ALL_OF_FORWARD = replace(_GATED, token_gate=True, gate_multiplier=0.6, down_multiplier=1.7)
FEED_FORWARD: Mapping[str, FeedForward] = {
    **{str(activation): replace(_FORWARD, activation=activation) for activation in ACTIVATIONS},
    "gated": _GATED,
    "gated gelu": replace(_GATED, activation="gelu", projection_bias=True),
    "fused": replace(_GATED, gated=False, fused=True),
    "multipliers": replace(_GATED, projection_bias=True, gate_multiplier=0.6, down_multiplier=1.7),
    "token gate": replace(_GATED, token_gate=True),
    "all of it": _ALL_OF_FORWARD,
    "filling vectors": replace(_GATED, d_model=64, d_hidden=128),
}

_EXPERTS = Experts(d_model=24, d_hidden=19, experts=8, top_k=3)
_GATED_EXPERTS = replace(_EXPERTS, gated=True, activation="silu")
_SIGMOID = Routing(scores="sigmoid", corrected=True, normalised=True, eps=1e-6)
_NEMOTRON = replace(
    _EXPERTS, activation="relu2", latent=10, latent_bias=True,
    routing=replace(_SIGMOID, groups=4, chosen_groups=2, scaling=2.5),
)  # fmt: skip
_MANY_EXPERTS = replace(_GATED_EXPERTS, d_model=64, d_hidden=32, experts=20, top_k=5)
EXPERTS: Mapping[str, Experts] = {
    "plain": _EXPERTS,
    "jamba": replace(_GATED_EXPERTS, routing=Routing(scores="softmax")),
    "granite": replace(_GATED_EXPERTS, gated=False, fused=True),
    "qwen3_next": replace(
        _GATED_EXPERTS, routing=Routing(scores="softmax", normalised=True), experts=19, together=True
    ),
    "lfm2_moe": replace(_GATED_EXPERTS, routing=replace(_SIGMOID, scaling=1.5)),
    "nemotron_h": _NEMOTRON,
    "together": replace(_EXPERTS, together=True, gated=True),
    "fused together": replace(_EXPERTS, together=True, fused=True, latent=13),
    "all chosen": replace(_GATED_EXPERTS, top_k=20),
    "one": replace(_EXPERTS, experts=1, top_k=2),
    "filling vectors": _MANY_EXPERTS,
}

CASES: Mapping[str, Case] = {
    "attention": Case(ATTENTION, _ALL_OF_ATTENTION, [_ALL_OF_ATTENTION], spoilt=(2, 6, 90)),
    "mamba1": Case(MAMBA1, MAMBA1["sizes that fill no vector"], [MAMBA1["norms"]]),
    "mamba2": Case(MAMBA2, MAMBA2["two groups"], [MAMBA2["one group, heads of sixteen"]]),
    "delta_rule": Case(DELTA_RULE, _DELTA_RULE, [DELTA_RULE["values wider than a block of columns"]]),
    "shared_step": Case(SHARED_STEP, _SHARED_STEP, [_SHARED_STEP], spoilt=(12,)),
    # its inputs are forgotten again
    "short_conv": Case(SHORT_CONV, SHORT_CONV["plain"], [SHORT_CONV["plain"]], spoilt=(4,), scan=False),
    "feed_forward": Case(
        FEED_FORWARD, _ALL_OF_FORWARD, [replace(_ALL_OF_FORWARD, d_hidden=300)], spoilt=(20,), scan=False
    ),
    # a pass of several threads has more tokens of each expert, whose products then add up in another order
    "experts": Case(
        EXPERTS, _NEMOTRON, [replace(_MANY_EXPERTS, d_hidden=hidden) for hidden in (19, 600)], [(3, 64), (3, 80)], (20,)
    ),
}
