"""Family `falcon_h1` (Zuo et al. 2025): attention and Mamba-2 side by side in every layer, then a feed-forward.

Dimensions: `d` model, `I` inner.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.config import Branch, Part
from ssm_mp.errors import CheckpointError
from ssm_mp.families.family import OUTER, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import (
    LAYER,
    MAMBA_KEYS,
    attention_block,
    biased,
    inner_width,
    mamba2_block,
    require_inner,
    rotary_of,
)
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_KEYS = replace(MAMBA_KEYS, out_bias="projectors_bias")


class FalconH1Family(Family):
    """Falcon-H1."""

    word = "falcon_h1"
    model_types = ("falcon_h1",)
    mark = r"layers\.[0-9]+\.mamba\.(?:dt_bias|A_log)$"
    example = "model.layers.0.mamba.dt_bias"
    aliases = OUTER
    plain_in_mlx = False

    def recognises(self, names: Iterable[str]) -> bool:
        held = list(names)
        layers = [
            {name.split(".")[1] for name in held if re.match(pattern, name)}
            for pattern in (LAYER + r"mamba\.dt_bias", LAYER + r"self_attn\.", LAYER + r"feed_forward\.")
        ]
        return bool(set.intersection(*layers))

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        _refuse_mlx(said)
        d = said.size("hidden_size", said.shown(LAYER + r"input_layernorm\.weight", 0))
        norm = NormForm(said.number("rms_norm_eps", 1e-5, most=1.0))
        said.activation()
        plain = attention_block(said, "self_attn", d, rotary=None)
        attention = replace(
            plain, rotary=rotary_of(said, plain.head_dim), key_multiplier=said.number("key_multiplier", 1.0)
        )
        side_by_side = (
            Part(
                "mamba", _mamba(said, d, norm), said.number("ssm_in_multiplier", 1.0),
                said.number("ssm_out_multiplier", 1.0),
            ),
            Part(
                "self_attn", attention, said.number("attention_in_multiplier", 1.0),
                said.number("attention_out_multiplier", 1.0),
            ),
        )  # fmt: skip
        layer = (
            Branch("input_layernorm", norm, side_by_side),
            Branch("pre_ff_layernorm", norm, (Part("feed_forward", _forward(said, d)),)),
        )
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), max_length=said.size("max_position_embeddings", default=8192),
            layers=(layer,) * said.layers(), embedded_by=said.number("embedding_multiplier", 1.0),
            logits_by=said.number("lm_head_multiplier", 1.0),
        )  # fmt: skip
        return config, said.closing("layers_block_type", "attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor")

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


def _mamba(said: Said, d: int, norm: NormForm) -> Mamba2:
    """The Mamba-2 mixers: norm first, gate first or no norm, and a multiplier for each piece of in_proj."""
    inner = inner_width(said, LAYER + r"mamba\.")
    require_inner(said, "mamba_d_ssm", "mamba_expand", d, inner)
    held = said.shown(LAYER + r"mamba\.norm\.weight", 0) is not None
    normed = said.flag("mamba_rms_norm", held)
    said.require(normed or not held, "mamba_rms_norm", "true, as the file holds such norms", normed)
    norm_first = said.flag("mamba_norm_before_gate", True)
    factors = said.numbers("ssm_multipliers", 5, (1.0,) * 5)
    return replace(
        mamba2_block(said, _KEYS, "mamba", d, norm.eps),
        gate="no_norm" if not normed else "norm_first" if norm_first else "gate_first",
        multipliers=None if set(factors) == {1.0} else (factors[0], factors[1], factors[2], factors[3], factors[4]),
    )


def _forward(said: Said, d: int) -> FeedForward:
    gate, down = said.numbers("mlp_multipliers", 2, (1.0, 1.0))
    return FeedForward(
        d_model=d, d_hidden=said.size("intermediate_size", said.shown(LAYER + r"feed_forward\.down_proj\.weight", 1)),
        activation="silu", gated=True, gate_multiplier=gate, down_multiplier=down,
        projection_bias=biased(said, "mlp_bias", False, LAYER + r"feed_forward\.(?:gate|up|down)_proj"),
    )  # fmt: skip


def _refuse_mlx(said: Said) -> None:
    """Raise CheckpointError for weights that MLX has multiplied already, which the config does not say."""
    kernel = said.shown(LAYER + r"mamba\.conv1d\.weight", 1)
    if kernel is not None and kernel > 1 and said.shown(LAYER + r"mamba\.conv1d\.weight", 2) == 1:
        raise CheckpointError(
            f"mamba.conv1d.weight: expected [W, 1, K], found [W, {kernel}, 1], as MLX writes it; its weights have the "
            "config's multipliers in them already, give the checkpoint that they were made from"
        )
