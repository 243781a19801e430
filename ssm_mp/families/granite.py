"""Family `granitemoehybrid` (Granite 4.0 H): Mamba-2 or attention, then a feed-forward or experts, in every layer.

Dimensions: `V` vocabulary, `d` model, `X` experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.routing import Routing
from ssm_mp.config import Branch, Part
from ssm_mp.families.experts import Arranged, arranged_experts, together
from ssm_mp.families.family import OUTER, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import (
    LAYER,
    MAMBA_KEYS,
    MARKS,
    WORDS,
    attention_block,
    head_width,
    mamba2_block,
    rotary_of,
)
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm


class GraniteFamily(Family):
    """Granite 4.0 H, dense and with experts."""

    word = "granitemoehybrid"
    model_types = ("granitemoehybrid",)
    mark = r"layers\.[0-9]+\.mamba\.(?:dt_bias|A_log)$"
    example = "model.layers.0.mamba.dt_bias"
    aliases = OUTER

    def recognises(self, names: Iterable[str]) -> bool:
        held = list(names)
        return any(re.match(self.mark, name) for name in held) and any(".shared_mlp." in name for name in held)

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Arranged:
        return arranged_experts(tensors, r"(layers\.[0-9]+\.block_sparse_moe)\.((?:input|output)_linear\.weight)")

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        d = said.size("hidden_size", said.shown(LAYER + r"input_layernorm\.weight", 0))
        norm = NormForm(said.number("rms_norm_eps", 1e-6, most=1.0))
        positions = said.word("position_embedding_type", ("nope", "rope"), "nope")
        residual = said.number("residual_multiplier", 1.0)
        rotary = rotary_of(said, head_width(said, d)) if positions == "rope" else None
        scale = said.number("attention_multiplier", 1.0)
        attention = replace(attention_block(said, "self_attn", d, rotary), scale=scale)
        kinds = said.kinds(MARKS, WORDS, "layer_types")
        mamba = mamba2_block(said, MAMBA_KEYS, "mamba", d, norm.eps, groups=None) if "mamba" in kinds else attention
        mixers = {"mamba": Part("mamba", mamba), "attention": Part("self_attn", attention)}
        forward = Branch("post_attention_layernorm", norm, self._forward(said, d), residual)
        said.layers()
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), max_length=said.size("max_position_embeddings", default=2048),
            layers=tuple((Branch("input_layernorm", norm, (mixers[kind],), residual), forward) for kind in kinds),
            embedded_by=said.number("embedding_multiplier", 1.0), logits_by=1 / said.number("logits_scaling", 1.0),
        )  # fmt: skip
        return config, said.closing("intermediate_size", "num_experts_per_tok", "shared_intermediate_size")

    def _forward(self, said: Said, d: int) -> tuple[Part, ...]:
        """Experts, if any, beside the feed-forward that every token takes."""
        said.activation()
        width = said.size("shared_intermediate_size", said.shown(LAYER + r"shared_mlp\.output_linear\.weight", 1))
        shared = Part("shared_mlp", FeedForward(d_model=d, d_hidden=width, activation="silu", gated=True, fused=True))
        count = said.whole("num_local_experts", 0)
        shown = said.shown(LAYER + r"block_sparse_moe\.router\.layer\.weight", 0)
        said.require(count == (shown or 0), "num_local_experts", f"{shown or 0}, as the routers' shapes show", count)
        if not count:
            return (shared,)
        top_k = said.size("num_experts_per_tok")
        said.require(top_k <= count, "num_experts_per_tok", f"at most the {count} experts", top_k)
        outward = LAYER + r"block_sparse_moe\.experts\.(?:[0-9]+\.)?output_linear\.weight"
        experts = Experts(
            d_model=d, d_hidden=said.size("intermediate_size", said.shown(outward, 1)), experts=count, top_k=top_k,
            routing=Routing("chosen_softmax"), activation="silu", gated=True, fused=True, together=together(count),
            names=(("router", "router.layer"),),
        )  # fmt: skip
        return Part("block_sparse_moe", experts), shared

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)
