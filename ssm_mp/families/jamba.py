"""Family `jamba` (Lieber et al. 2024): Mamba-1 with inner norms or attention, then a feed-forward or experts.

Dimensions: `d` model, `X` experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.routing import Routing
from ssm_mp.config import Branch, Part
from ssm_mp.families.experts import Arranged, arranged_experts, together
from ssm_mp.families.family import OUTER, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import LAYER, Mamba1Keys, attention_block, mamba1_block
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_KEYS = Mamba1Keys(
    "mamba_d_state", "mamba_dt_rank", "mamba_expand", "mamba_d_conv", "mamba_conv_bias", "mamba_proj_bias"
)
_MIXERS = {"mamba": r"mamba\.", "attention": r"self_attn\."}
_FORWARDS = {"experts": r"feed_forward\.(?:experts|router)\.", "feed-forward": r"feed_forward\."}
_INNER_NORMS = (("dt_norm", "dt_layernorm"), ("B_norm", "b_layernorm"), ("C_norm", "c_layernorm"))


class JambaFamily(Family):
    """Jamba."""

    word = "jamba"
    model_types = ("jamba",)
    mark = r"layers\.[0-9]+\.mamba\.(?:x_proj|dt_proj)\."
    example = "model.layers.0.mamba.x_proj.weight"
    aliases = OUTER

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(self.mark, name) for name in names)

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Arranged:
        return arranged_experts(tensors)

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        d = said.size("hidden_size", said.shown(LAYER + r"input_layernorm\.weight", 0))
        norm = NormForm(said.number("rms_norm_eps", 1e-6, most=1.0))
        said.activation()
        words = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
        kinds = said.kinds(_MIXERS, words, "layers_block_type")
        forwards = said.kinds(_FORWARDS, {})
        _require_period(said, "attn_layer", 8, 4, [kind == "attention" for kind in kinds])
        if "experts" in forwards or said.size("num_experts", default=1) > 1:
            _require_period(said, "expert_layer", 2, 1, [kind == "experts" for kind in forwards])
        mixers = {"mamba": Part("mamba", _mamba(said, d, norm))}
        if "attention" in kinds:
            mixers["attention"] = Part("self_attn", attention_block(said, "self_attn", d, rotary=None))
        parts = {kind: Part("feed_forward", _forward(said, d, kind)) for kind in dict.fromkeys(forwards)}
        said.layers()
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), max_length=said.size("max_position_embeddings", default=1 << 18),
            layers=tuple(
                (Branch("input_layernorm", norm, (mixers[kind],)), Branch("pre_ff_layernorm", norm, (parts[forward],)))
                for kind, forward in zip(kinds, forwards, strict=True)
            ),
        )  # fmt: skip
        return config, said.closing(
            "num_experts_per_tok", "expert_layer_period", "expert_layer_offset", "num_attention_heads",
            "num_key_value_heads", "calc_logits_for_entire_prompt", "n_ctx",
        )  # fmt: skip

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


def _mamba(said: Said, d: int, norm: NormForm) -> Mamba1:
    """The Mamba-1 mixers, by default with a norm of the step, B and C each."""
    plain = mamba1_block(said, _KEYS, "mamba", d)
    held = said.shown(LAYER + r"mamba\.dt_layernorm\.weight", 0) is not None
    stated = said.flag("mamba_inner_layernorms", True)
    said.require(stated or not held, "mamba_inner_layernorms", "true, as the file holds such norms", stated)
    return replace(plain, inner_norms=norm, names=_INNER_NORMS) if stated else plain


def _forward(said: Said, d: int, kind: str) -> FeedForward | Experts:
    """A feed-forward, or experts of the same width."""
    width = said.size(
        "intermediate_size", said.shown(LAYER + r"feed_forward\.(?:experts\.(?:[0-9]+\.)?)?down_proj\.weight", 1)
    )
    if kind == "feed-forward":
        return FeedForward(d_model=d, d_hidden=width, activation="silu", gated=True)
    count = said.size("num_experts", said.shown(LAYER + r"feed_forward\.router\.weight", 0))
    top_k = said.size("num_experts_per_tok")
    said.require(top_k <= count, "num_experts_per_tok", f"at most the {count} experts", top_k)
    return Experts(
        d_model=d, d_hidden=width, experts=count, top_k=top_k, routing=Routing("softmax"), activation="silu",
        gated=True, together=together(count),
    )  # fmt: skip


def _require_period(said: Said, what: str, period: int, offset: int, held: Sequence[bool]) -> None:
    """Raise CheckpointError where the config counts out other layers than those that the tensors show.

    period, offset: what stands for nothing said. A config that says neither is not held against the tensors.
    """
    values = said.stored.values
    keys = (f"{what}_period", f"{what}_offset")
    every, first = said.size(keys[0], default=period), said.whole(keys[1], offset)
    meant = [i for i in range(len(held)) if i % every == first]
    shows = [i for i, one in enumerate(held) if one]
    if any(values.get(key) is not None for key in keys) and meant != shows:
        raise said.stored.wrong(
            " · ".join(keys), f"layers {shows}, as the tensors show", f"every {every} from {first}, layers {meant}"
        )
