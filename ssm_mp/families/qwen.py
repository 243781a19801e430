"""Families `qwen3_next`, `qwen3_5_text` and `qwen3_5_moe_text`: the gated delta rule or gated attention, then a
feed-forward or experts. Of a folder with text and vision (`qwen3_5`, `qwen3_5_moe`), the language model is read.

Dimensions: `V` vocabulary, `d` model, `X` experts, `G` key heads, `H` value heads, `n` keys and `m` values of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.routing import Routing
from ssm_mp.config import Branch, Part
from ssm_mp.errors import CheckpointError
from ssm_mp.families.experts import Arranged, arranged_experts, together
from ssm_mp.families.family import Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import LAYER, attention_block, refuse_windows, rotary_of
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.config_keys import TIES
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.files.tree import members
from ssm_mp.modules.norm import NormForm

_MARKS = {"delta": r"linear_attn\.", "attention": r"self_attn\."}
_WORDS = {"linear_attention": "delta", "full_attention": "attention"}
_FORWARDS = {"experts": r"mlp\.(?:gate|experts|shared_expert)\.", "dense": r"mlp\.down_proj\."}
_SHARED_NAMES = (
    *((leaf, f"shared_expert.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")),
    ("token_gate", "shared_expert_gate"),
)
_VISION_KEYS = (
    "text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "language_model_only",
)  # fmt: skip
_BESIDE = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts",
    "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "full_attention_interval",
    "mamba_ssm_dtype", "mtp_use_dedicated_embeddings", "max_window_layers", "base_config_key",
)  # fmt: skip


class QwenNextFamily(Family):
    """Qwen3-Next: two fused projections in a mixer, experts with one that every token takes."""

    word = "qwen3_next"
    model_types: tuple[str, ...] = ("qwen3_next",)
    mark = r"layers\.[0-9]+\.linear_attn\.(?:dt_bias|A_log)$"
    example = "model.layers.0.linear_attn.dt_bias"
    aliases = ((r"^embed_tokens\.", "embedding."),)
    plain_in_mlx = False

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(LAYER + r"linear_attn\.in_proj_qkvz\.", name) for name in names)

    def is_left_out(self, name: str) -> bool:
        return re.search(r"(?:^|\.)(?:visual|mtp)\.", name) is not None

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Arranged:
        return arranged_experts(tensors, gated=("gate_proj", "up_proj", "down_proj"))

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        text, notes = _text_config(stored)
        said = Said(text, shapes)
        refuse_windows(said)
        d = said.size("hidden_size", said.shown(LAYER + r"input_layernorm\.weight", 0))
        norm = NormForm(said.number("rms_norm_eps", 1e-6, most=1.0), one_plus=True)
        said.activation()
        kinds = said.kinds(_MARKS, _WORDS, "layer_types")
        said.layers()
        mixers = {
            "delta": (Part("linear_attn", _delta_rule(said, d, norm.eps)),),
            "attention": (Part("self_attn", _attention(said, d, norm)),) if "attention" in kinds else (),
        }
        layers = tuple(
            (
                Branch("input_layernorm", norm, mixers[kind]),
                Branch("post_attention_layernorm", norm, forward),
            )
            for kind, forward in zip(kinds, self._forwards(said, d), strict=True)
        )
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(), layers=layers, max_length=said.size("max_position_embeddings", default=32768),
        )  # fmt: skip
        return config, (*notes, *said.closing("num_attention_heads", "num_key_value_heads", *_BESIDE))

    def _forwards(self, said: Said, d: int) -> list[tuple[Part, ...]]:
        """What follows the mixer of each layer."""
        kinds = said.kinds(_FORWARDS, {})
        _require_sparse(said, kinds)
        parts: dict[str, tuple[Part, ...]] = {}
        if "dense" in kinds:
            parts["dense"] = (_dense(said, d),)
        if "experts" in kinds:
            parts["experts"] = _experts(said, d)
        return [parts[kind] for kind in kinds]

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


class Qwen35Family(QwenNextFamily):
    """Qwen3.5: four projections in a mixer, plain feed-forwards."""

    word = "qwen3_5_text"
    model_types = ("qwen3_5_text", "qwen3_5")

    def recognises(self, names: Iterable[str]) -> bool:
        held = list(names)
        four = any(re.match(LAYER + r"linear_attn\.in_proj_qkv\.", name) for name in held)
        experts = any(re.match(LAYER + _FORWARDS["experts"], name) for name in held)
        return four and experts is (self.word == "qwen3_5_moe_text")


class Qwen35MoeFamily(Qwen35Family):
    """Qwen3.5 with experts."""

    word = "qwen3_5_moe_text"
    model_types = ("qwen3_5_moe_text", "qwen3_5_moe")


def _text_config(stored: StoredConfig) -> tuple[StoredConfig, tuple[str, ...]]:
    """The language model's part of a config, which may be a config within one for text and vision; and notes.

    Whether the head is tied is said outside, where anything is said of it there.
    """
    inside = members(stored.values.get("text_config"))
    if inside is None:
        return stored, ()
    ties = {key: stored.values[key] for key in TIES if stored.values.get(key) is not None}
    text = StoredConfig(f"text_config in {stored.source}", {**inside, **ties})
    return text, Said(stored, {}).closing(*_VISION_KEYS)


def _delta_rule(said: Said, d: int, eps: float) -> DeltaRule:
    """The mixers, their sizes held against the shapes. Raises CheckpointError where they do not fit."""
    at = LAYER + r"linear_attn\."
    heads = said.size("linear_num_value_heads", said.shown(at + "A_log", 0))
    value_dim = said.size("linear_value_head_dim", said.shown(at + r"norm\.weight", 0))
    key_heads = said.size("linear_num_key_heads")
    said.require(heads % key_heads == 0, "linear_num_key_heads", f"a divisor of the {heads} value heads", key_heads)
    channels = said.shown(at + r"conv1d\.weight", 0)
    if channels is None:
        raise CheckpointError("no tensor shows the channels of the mixers; expected layers.….linear_attn.conv1d.weight")
    keys = (channels - heads * value_dim) // 2
    key_dim = said.size("linear_key_head_dim", default=max(keys // key_heads, 1))
    both, of = "linear_num_key_heads and linear_key_head_dim", f"half of {channels} channels less {heads} · {value_dim}"
    said.require(key_heads * key_dim == keys, both, f"a product of {keys}, {of}", f"{key_heads} · {key_dim}")
    return DeltaRule(
        d_model=d, key_heads=key_heads, value_heads=heads, key_dim=key_dim, value_dim=value_dim,
        d_conv=said.size("linear_conv_kernel_dim", said.shown(at + r"conv1d\.weight", 2)), norm_eps=eps,
        fused=said.shown(at + r"in_proj_qkvz\.weight", 0) is not None,
    )  # fmt: skip


def _attention(said: Said, d: int, norm: NormForm) -> Attention:
    width = said.size("head_dim", said.shown(LAYER + r"self_attn\.q_norm\.weight", 0))
    block = attention_block(said, "self_attn", d, rotary_of(said, width, share=0.25), width)
    return replace(block, qk_norm=norm, output_gate=said.flag("attn_output_gate", True))


def _require_sparse(said: Said, kinds: tuple[str, ...]) -> None:
    """Raise CheckpointError where a config puts experts into other layers than the tensors show."""
    plain = said.stored.values.get("mlp_only_layers")
    step = said.count("decoder_sparse_step")
    if plain is None and step is None:
        return
    named = list(plain) if isinstance(plain, list | tuple) else []
    said.require(plain is None or named == plain, "mlp_only_layers", "a list of layers", plain)
    dense = [i for i in range(len(kinds)) if i in named or (i + 1) % (step or 1)]
    held = [i for i, kind in enumerate(kinds) if kind == "dense"]
    if "experts" in kinds:
        expected = f"what leaves out experts in layers {held}, as the tensors show"
        said.require(dense == held, "mlp_only_layers and decoder_sparse_step", expected, f"{named} and {step or 1}")


def _dense(said: Said, d: int) -> Part:
    width = said.size("intermediate_size", said.shown(LAYER + r"mlp\.down_proj\.weight", 1))
    return Part("mlp", FeedForward(d_model=d, d_hidden=width, activation="silu", gated=True))


def _experts(said: Said, d: int) -> tuple[Part, ...]:
    """The experts, and the one that every token takes, with a gate of its own."""
    count = said.size("num_experts", said.shown(LAYER + r"mlp\.gate\.weight", 0))
    top_k = said.size("num_experts_per_tok")
    said.require(top_k <= count, "num_experts_per_tok", f"at most the {count} experts", top_k)
    width = said.size("moe_intermediate_size", said.shown(LAYER + r"mlp\.experts\.(?:[0-9]+\.)?down_proj\.weight", 1))
    shared = said.size(
        "shared_expert_intermediate_size", said.shown(LAYER + r"mlp\.shared_expert\.down_proj\.weight", 1)
    )
    routing = Routing("softmax", said.flag("norm_topk_prob", True))
    experts = Experts(
        d_model=d, d_hidden=width, experts=count, top_k=top_k, routing=routing, activation="silu", gated=True,
        together=together(count), names=(("router", "gate"),),
    )  # fmt: skip
    always = FeedForward(
        d_model=d, d_hidden=shared, activation="silu", gated=True, token_gate=True, names=_SHARED_NAMES
    )
    return Part("mlp", experts), Part("mlp", always)
