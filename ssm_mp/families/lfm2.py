"""Families `lfm2` and `lfm2_moe`: gated short convolutions or attention, then a feed-forward or experts.

Dimensions: `V` vocabulary, `d` model, `X` experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.routing import Routing
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.config import Branch, Part
from ssm_mp.families.experts import Arranged, arranged_experts, together
from ssm_mp.families.family import Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import LAYER, attention_block, has_bias, refuse_windows, require_indices, rotary_of
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_MARKS = {"conv": r"conv\.", "attention": r"self_attn\."}
_WORDS = {"conv": "conv", "short_conv": "conv", "full_attention": "attention", "attention": "attention"}
_FORWARDS = {"experts": r"feed_forward\.(?:gate|experts)\.", "dense": r"feed_forward\.w1\."}
_ATTENTION_NAMES = (("o_proj", "out_proj"), ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm"))
_FORWARD_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
_MIXER_KEYS = "conv_dim conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc full_attn_idxs"
_FORWARD_KEYS = """
block_dim block_ff_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu block_use_xavier_init
block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim intermediate_size
"""
"""What configs of the first releases hold besides; transformers does not look at those that are not read here."""


class Lfm2Family(Family):
    """LFM2 without experts."""

    word = "lfm2"
    model_types = ("lfm2",)
    mark = r"layers\.[0-9]+\.(?:operator_norm\.weight|conv\.conv\.weight)$"
    example = "model.layers.0.operator_norm.weight"
    aliases = ((r"^embed_tokens\.", "embedding."), (r"^embedding_norm\.", "norm."))

    def recognises(self, names: Iterable[str]) -> bool:
        held = list(names)
        marked = any(re.match(self.mark, name) for name in held)
        return marked and _with_experts(held) is (self.word == "lfm2_moe")

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        refuse_windows(said)
        d = said.size("hidden_size", said.shown(LAYER + r"operator_norm\.weight", 0))
        norm = NormForm(said.number("norm_eps", 1e-5, most=1.0))
        kinds = said.kinds(_MARKS, _WORDS, "layer_types")
        if stored.values.get("layer_types") is None:
            require_indices(said, "full_attn_idxs", [i for i, kind in enumerate(kinds) if kind == "attention"])
        said.layers()
        mixers = {
            "attention": Part("self_attn", _attention(said, d, norm)) if "attention" in kinds else None,
            "conv": Part("conv", _convolution(said, d)) if "conv" in kinds else None,
        }
        forwards = self._forwards(said, d)
        layers = tuple(
            (Branch("operator_norm", norm, (mixer,)), Branch("ffn_norm", norm, (forward,)))
            for kind, forward in zip(kinds, forwards, strict=True)
            if (mixer := mixers[kind]) is not None
        )
        tied = said.tied() and said.flag("tie_embedding", True)
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=tied, layers=layers, max_length=said.size("max_position_embeddings", default=128_000),
        )  # fmt: skip
        return config, said.closing(
            "num_attention_heads", "num_key_value_heads", "conv_L_cache", "conv_bias", *_MIXER_KEYS.split(),
            *_FORWARD_KEYS.split(),
        )  # fmt: skip

    def _forwards(self, said: Said, d: int) -> tuple[Part, ...]:
        """What follows the mixer of each layer."""
        shown = said.shown(LAYER + r"feed_forward\.w1\.weight", 0)
        if shown is None:
            raise said.missing("intermediate_size", "a layer with feed_forward.w1.weight")
        _require_width(said, shown)
        return (_dense(d, shown),) * said.layers()

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


class Lfm2MoeFamily(Lfm2Family):
    """LFM2 with experts in all layers but the first ones."""

    word = "lfm2_moe"
    model_types = ("lfm2_moe",)

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Arranged:
        return arranged_experts(tensors, gated=("w1", "w3", "w2"))

    def _forwards(self, said: Said, d: int) -> tuple[Part, ...]:
        kinds = said.kinds(_FORWARDS, {})
        dense = kinds.index("experts")
        said.require("dense" not in kinds[dense:], "num_dense_layers", "no layer without experts after one with", dense)
        held = f"{dense}, as the tensors show"
        found = said.whole("num_dense_layers", dense)
        said.require(found == dense, "num_dense_layers", held, found)
        width = said.shown(LAYER + r"feed_forward\.w1\.weight", 0)
        parts = {"experts": _experts(said, d)}
        if width is not None:
            parts["dense"] = _dense(d, said.size("intermediate_size", width))
        return tuple(parts[kind] for kind in kinds)


def _with_experts(names: Iterable[str]) -> bool:
    return any(re.match(LAYER + r"feed_forward\.(?:gate|experts)\.", name) for name in names)


def _attention(said: Said, d: int, norm: NormForm) -> Attention:
    shown = said.shown(LAYER + r"self_attn\.q_layernorm\.weight", 0)
    width = said.size("head_dim", shown, default=d // said.size("num_attention_heads"))
    block = attention_block(said, "self_attn", d, rotary_of(said, width, theta=1e6), width)
    return replace(block, qk_norm=norm, names=_ATTENTION_NAMES)


def _convolution(said: Said, d: int) -> ShortConv:
    biased = said.flag("conv_bias", False) or has_bias(said, LAYER + r"conv\.(?:in_proj|conv|out_proj)")
    kernel = said.size("conv_L_cache", said.shown(LAYER + r"conv\.conv\.weight", 2))
    return ShortConv(d_model=d, d_conv=kernel, with_bias=biased)


def _dense(d: int, width: int) -> Part:
    block = FeedForward(d_model=d, d_hidden=width, activation="silu", gated=True, names=_FORWARD_NAMES)
    return Part("feed_forward", block)


def _require_width(said: Said, shown: int) -> None:
    """Raise CheckpointError where the config means another width of the feed-forwards than `shown`."""
    key = "intermediate_size" if said.count("block_ff_dim") is None else "block_ff_dim"
    width = said.count(key)
    if width is None:
        return
    rounded = width
    if said.flag("block_auto_adjust_ff_dim", True):
        multiple = said.size("block_multiple_of", default=256)
        rounded = int(said.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        rounded = multiple * math.ceil(rounded / multiple)
    expected = f"what makes feed-forwards of {shown}, as the tensors' shapes show"
    said.require(rounded == shown, key, f"{expected}; it makes {rounded}" if rounded != width else expected, width)


def _experts(said: Said, d: int) -> Part:
    count = said.size("num_experts", said.shown(LAYER + r"feed_forward\.gate\.weight", 0))
    top_k = said.size("num_experts_per_tok")
    said.require(top_k <= count, "num_experts_per_tok", f"at most the {count} experts", top_k)
    corrected = said.flag("use_expert_bias", True)
    held = said.shown(LAYER + r"feed_forward\.expert_bias", 0) is not None
    said.require(corrected or not held, "use_expert_bias", "true, as there is feed_forward.expert_bias", False)
    routing = Routing(
        "sigmoid", said.flag("norm_topk_prob", True), eps=1e-6, corrected=corrected,
        scaling=said.number("routed_scaling_factor", 1.0),
    )  # fmt: skip
    width = said.size("moe_intermediate_size", said.shown(LAYER + r"feed_forward\.experts\.(?:[0-9]+\.)?w2\.weight", 1))
    return Part("feed_forward", Experts(
        d_model=d, d_hidden=width, experts=count, top_k=top_k, routing=routing, activation="silu", gated=True,
        together=together(count), names=(("router", "gate"), ("correction_bias", "expert_bias"), *_FORWARD_NAMES),
    ))  # fmt: skip
