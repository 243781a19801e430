"""Family `bamba`: Mamba-2 or attention, then a feed-forward, in every layer.

Dimensions: `d` model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.config import Branch, Part
from ssm_mp.families.family import OUTER, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import (
    LAYER,
    MAMBA_KEYS,
    MARKS,
    WORDS,
    attention_block,
    has_bias,
    head_width,
    mamba2_block,
    require_indices,
    rotary_of,
)
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm


class BambaFamily(Family):
    """Bamba."""

    word = "bamba"
    model_types = ("bamba",)
    mark = r"layers\.[0-9]+\.mamba\.(?:dt_bias|A_log)$"
    example = "model.layers.0.mamba.dt_bias"
    aliases = OUTER

    def recognises(self, names: Iterable[str]) -> bool:
        held = list(names)
        both = {name.split(".")[1] for name in held if ".mamba." in name} & {
            name.split(".")[1] for name in held if ".self_attn." in name
        }
        return (
            any(re.match(self.mark, name) for name in held)
            and not both
            and any(re.match(LAYER + r"feed_forward\.gate_proj\.", name) for name in held)
        )

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        d = said.size("hidden_size", said.shown(LAYER + r"input_layernorm\.weight", 0))
        norm = NormForm(said.number("rms_norm_eps", 1e-5, most=1.0))
        said.activation()
        # transformers turns half of each head, whatever else is said
        attention = attention_block(said, "self_attn", d, rotary_of(said, head_width(said, d), share=0.5))
        mamba = mamba2_block(said, MAMBA_KEYS, "mamba", d, norm.eps)
        mixers = {"mamba": Part("mamba", mamba), "attention": Part("self_attn", attention)}
        width = said.size("intermediate_size", said.shown(LAYER + r"feed_forward\.down_proj\.weight", 1))
        bias = said.flag("mlp_bias", False) or has_bias(said, LAYER + r"feed_forward\.down_proj")
        plain = FeedForward(d_model=d, d_hidden=width, activation="silu", gated=True, projection_bias=bias)
        forward = Branch("pre_ff_layernorm", norm, (Part("feed_forward", plain),))
        kinds = said.kinds(MARKS, WORDS, "layer_types")
        require_indices(said, "attn_layer_indices", [i for i, kind in enumerate(kinds) if kind == "attention"])
        said.layers()
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), max_length=said.size("max_position_embeddings", default=2048),
            layers=tuple((Branch("input_layernorm", norm, (mixers[kind],)), forward) for kind in kinds),
        )  # fmt: skip
        return config, said.closing("attn_layer_indices", "attn_rotary_emb")

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)
