"""Family `nemotron_h` (Nemotron-H, Nemotron Nano 2 and 3): in every layer one of Mamba-2, attention, a feed-forward or
experts.

Dimensions: `d` model, `X` experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.routing import Routing
from ssm_mp.config import Branch, Part
from ssm_mp.families.experts import Arranged, arranged_experts, together
from ssm_mp.families.family import BACKBONE, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import LAYER, Mamba2Keys, attention_block, biased, has_bias, mamba2_block
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_AT = LAYER + r"mixer\."
_MARKS = {
    "mamba": r"mixer\.(?:dt_bias|A_log)$",
    "attention": r"mixer\.[qkvo]_proj\.",
    "moe": r"mixer\.(?:gate|experts)\.",
    "mlp": r"mixer\.(?:up|down)_proj\.",
}
_WORDS = {
    "mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention",
    "mlp": "mlp", "moe": "moe", "M": "mamba", "*": "attention", "-": "mlp", "E": "moe",
}  # fmt: skip
"""Of lists and of the hub's pattern, a letter a layer."""
_EXPERT_NAMES = (
    ("router", "gate"), ("correction_bias", "gate.e_score_correction_bias"), ("latent_in", "fc1_latent_proj"),
    ("latent_out", "fc2_latent_proj"),
)  # fmt: skip


class NemotronHFamily(Family):
    """Nemotron-H, dense and with experts."""

    word = "nemotron_h"
    model_types = ("nemotron_h",)
    mark = r"(?:backbone\.)?layers\.[0-9]+\.mixer\.(?:dt_bias|A_log)$"
    example = "backbone.layers.0.mixer.dt_bias"
    aliases = (*BACKBONE, (r"(\.experts\.(?:up|down)_proj)$", r"\1.weight"))

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(r"(?:backbone\.)?layers\.[0-9]+\.mixer\.dt_bias$", name) for name in names)

    def is_left_out(self, name: str) -> bool:
        return re.match(r"(?:backbone\.)?mtp\.", name) is not None  # predicts further tokens, beside the model

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Arranged:
        return arranged_experts(tensors, r"(layers\.[0-9]+\.mixer)\.experts\.((?:up|down)_proj\.weight)")

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        d = said.size("hidden_size", said.shown(LAYER + r"norm\.weight", 0))
        eps = said.number("rms_norm_eps", said.number("norm_eps", 1e-5, most=1.0), most=1.0)
        norm = NormForm(said.number("layer_norm_epsilon", eps, most=1.0))
        said.word("mlp_hidden_act", ("relu2",), "relu2")
        said.activation(key="mamba_hidden_act")
        kinds = said.kinds(_MARKS, _WORDS, "layers_block_type", "hybrid_override_pattern")
        parts = {kind: _parts(said, d, norm, kind) for kind in dict.fromkeys(kinds)}
        said.layers()
        longest = said.size("max_position_embeddings", default=4096)
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), max_length=longest if "attention" in kinds else None,
            layers=tuple((Branch("norm", norm, parts[kind]),) for kind in kinds),
        )  # fmt: skip
        return config, said.closing(
            "intermediate_size", "num_attention_heads", "num_key_value_heads", "attention_head_dim", "attention_bias",
            "mlp_bias", "mamba_proj_bias", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "n_group", "topk_group",
            "moe_shared_expert_overlap", "norm_topk_prob", "routed_scaling_factor", "mtp_layers_block_type",
            "mtp_hybrid_override_pattern", "num_query_groups", "mamba_dt_max", "mamba_dt_limit", "mamba_dt_init_floor",
        )  # fmt: skip

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


def _parts(said: Said, d: int, norm: NormForm, kind: str) -> tuple[Part, ...]:
    """What such a layer is made of."""
    match kind:
        case "mamba":
            return (Part("mixer", _mamba(said, d, norm)),)
        case "attention":
            return (Part("mixer", _attention(said, d)),)
        case "mlp":
            return (Part("mixer", _forward(said, d, "intermediate_size", r"mixer\.")),)
    return _experts(said, d)


def _mamba(said: Said, d: int, norm: NormForm) -> Mamba2:
    """The Mamba-2 mixers, whose steps have a floor; transformers has no ceiling, whatever `time_step_limit` says."""

    def either(old: str, new: str) -> str:
        return new if said.stored.values.get(old) is None else old

    keys = Mamba2Keys(
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", either("mamba_n_groups", "n_groups"),
        either("mamba_d_conv", "conv_kernel"), either("mamba_conv_bias", "use_conv_bias"), "use_bias",
    )  # fmt: skip
    floor = said.number("mamba_dt_min", said.number("time_step_min", 0.001))
    return replace(mamba2_block(said, keys, "mixer", d, norm.eps), dt_limits=(floor, None))


def _attention(said: Said, d: int) -> Attention:
    """Attention without positions; its biases are those of the file, as in transformers, which reads no key."""
    plain = attention_block(said, "mixer", d, rotary=None)
    inside = has_bias(said, _AT + "[qkv]_proj"), has_bias(said, _AT + "o_proj")
    return replace(plain, qkv_bias=inside[0], o_bias=inside[1])


def _forward(said: Said, d: int, key: str, at: str) -> FeedForward:
    """A feed-forward without a gate."""
    return FeedForward(
        d_model=d, d_hidden=said.size(key, said.shown(LAYER + at + r"down_proj\.weight", 1)), activation="relu2",
        projection_bias=biased(said, "mlp_bias", False, LAYER + at + "(?:up|down)_proj"),
    )  # fmt: skip


def _experts(said: Said, d: int) -> tuple[Part, ...]:
    """Experts, and beside them the one that every token takes."""
    count = said.size("n_routed_experts", said.shown(_AT + r"gate\.weight", 0))
    top_k = said.size("num_experts_per_tok")
    groups, chosen = said.size("n_group", default=1), said.size("topk_group", default=1)
    said.require(count % groups == 0, "n_group", f"a divisor of the {count} experts", groups)
    said.require(chosen <= groups, "topk_group", f"at most the {groups} groups", chosen)
    within = chosen * (count // groups)
    said.require(top_k <= within, "num_experts_per_tok", f"at most the {within} experts of {chosen} groups", top_k)
    latent, stated = said.shown(_AT + r"fc1_latent_proj\.weight", 0), said.count("moe_latent_size")
    said.require(stated == latent, "moe_latent_size", f"{latent or 'null'}, as the tensors show", stated)
    experts = Experts(
        d_model=d, experts=count, top_k=top_k, activation="relu2", latent=latent, together=together(count),
        d_hidden=said.size("moe_intermediate_size", said.shown(_AT + r"experts\.(?:[0-9]+\.)?down_proj\.weight", 1)),
        latent_bias=biased(said, "mlp_bias", False, _AT + "fc[12]_latent_proj"),
        routing=Routing(
            "sigmoid", normalised=said.flag("norm_topk_prob", True), eps=1e-20, corrected=True, groups=groups,
            chosen_groups=chosen, scaling=said.number("routed_scaling_factor", 1.0),
        ),
        names=_EXPERT_NAMES,
    )  # fmt: skip
    shared = r"mixer\.shared_experts\."
    if said.whole("n_shared_experts", 1) == 0 and said.shown(LAYER + shared + r"down_proj\.weight", 1) is None:
        return (Part("mixer", experts),)
    width = "moe_shared_expert_intermediate_size"
    return Part("mixer", experts), Part("mixer.shared_experts", _forward(said, d, width, shared))
