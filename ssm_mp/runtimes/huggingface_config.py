"""The `config.json` of a model: what its own says, and over it what our configuration knows, key by key.

What decides on the computation is all from our configuration, so that a model whose original repository has other keys,
or whose config leaves keys to defaults that have changed since, gets a whole config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.rotary import LinearStretch, Llama3Stretch, Rotary, YarnStretch
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.config import Config, Part

UNLIMITED = 1e30
"""In place of infinity, for which JSON has no word: no step comes near it."""

Values = dict[str, Any]
_AnyBlock = TypeVar("_AnyBlock", bound=Block)

_CLASSES = {
    "mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM", "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM", "nemotron_h": "NemotronHForCausalLM", "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM", "qwen3_next": "Qwen3NextForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}  # fmt: skip
_NOT_OURS = ("transformers_version", "torch_dtype", "auto_map", "quantization_config", "_name_or_path")


def huggingface_config(config: Config, source: Mapping[str, Any]) -> Values:
    """The config of a model's folder; the language model's part alone where the source is one of text and vision.

    source: what the model's own config says; empty where nobody knows.
    """
    inside = source.get("text_config")
    own = {**source, **inside} if isinstance(inside, Mapping) else dict(source)
    own = {key: value for key, value in own.items() if not key.endswith("_config")}
    if own.get("model_type") not in (config.family, config.family.removesuffix("_text")) or "ssm_cfg" in own:
        own = {key: value for key, value in own.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own = {key: value for key, value in own.items() if key not in _NOT_OURS and _is_json(value)}
    common = {
        "architectures": [_CLASSES[config.family]], "model_type": config.family, "vocab_size": config.vocabulary,
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers, "tie_word_embeddings": config.tied,
        "dtype": "float32",
    }  # fmt: skip
    if config.max_tokens is not None:
        common["max_position_embeddings"] = config.max_tokens
    return {**own, **common, **_FAMILIES[config.family](config)}


def _is_json(value: object) -> bool:
    """Whether JSON has a word for a value: a pickled config may hold others, such as a type of torch's."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def parts(config: Config) -> Iterator[Part]:
    """Every block of a model in its place."""
    yield from (part for layer in config.branches for branch in layer for part in branch.parts)


def first(config: Config, kind: type[_AnyBlock], name: str | None = None) -> _AnyBlock | None:
    """The first block of a kind, where any of that name stands; None where there is none."""
    found = (part.block for part in parts(config) if name in (None, part.name))
    return next((block for block in found if isinstance(block, kind)), None)


def layers_of(config: Config, kind: type[Block]) -> list[bool]:
    """Of each layer, whether it has a block of a kind."""
    return [any(isinstance(p.block, kind) for branch in layer for p in branch.parts) for layer in config.branches]


def _layer_words(config: Config, attention: str, other: str) -> list[str]:
    return [attention if has else other for has in layers_of(config, Attention)]


def _mamba(config: Config) -> Values:
    block = first(config, Mamba1)
    assert block is not None
    falcon = {} if block.weightless_eps is None else {"mixer_rms_eps": block.weightless_eps}
    return {
        **_expansion("expand", block.d_inner, config.d_model), "intermediate_size": block.d_inner,
        "state_size": block.d_state, "conv_kernel": block.d_conv, "time_step_rank": block.dt_rank,
        "use_bias": block.projection_bias, "use_conv_bias": block.conv_bias, "hidden_act": "silu",
        "layer_norm_epsilon": config.final_norm.eps, **falcon,
    }  # fmt: skip


def _expansion(key: str, inner: int, width: int) -> Values:
    """How many times as wide a mixer is, which must be a whole number there; nothing where it is none."""
    return {key: inner // width} if inner % width == 0 else {}


def _limits(block: Mamba2) -> list[float]:
    low, high = block.dt_limits
    return [low, UNLIMITED if high is None else high]


def _mamba2(config: Config) -> Values:
    block = first(config, Mamba2)
    assert block is not None
    return {
        **_expansion("expand", block.d_inner, config.d_model), "intermediate_size": block.d_inner,
        "num_heads": block.n_heads, "head_dim": block.head_dim, "state_size": block.d_state,
        "n_groups": block.n_groups, "conv_kernel": block.d_conv, "use_bias": block.projection_bias,
        "use_conv_bias": block.conv_bias, "time_step_rank": "auto", "time_step_limit": _limits(block),
        "layer_norm_epsilon": config.final_norm.eps, "hidden_act": "silu",
    }  # fmt: skip


def _mamba_keys(config: Config) -> Values:
    """What Bamba, Granite 4.0 H and Falcon-H1 call their Mamba-2 mixers' sizes."""
    block = first(config, Mamba2)
    if block is None:
        return {}
    return {
        "mamba_n_heads": block.n_heads, "mamba_d_head": block.head_dim, "mamba_d_state": block.d_state,
        "mamba_n_groups": block.n_groups, "mamba_d_conv": block.d_conv,
        **_expansion("mamba_expand", block.d_inner, config.d_model), "mamba_conv_bias": block.conv_bias,
        "mamba_proj_bias": block.projection_bias, "time_step_limit": _limits(block),
    }  # fmt: skip


def _attention(config: Config) -> Values:
    block = first(config, Attention)
    if block is None:
        return {}
    values: Values = {
        "num_attention_heads": block.n_heads, "num_key_value_heads": block.n_kv_heads, "head_dim": block.head_dim,
        "attention_bias": block.qkv_bias,
    }  # fmt: skip
    return {**values, **({} if block.rotary is None else _rotary(block.rotary, block.head_dim))}


def _rotary(rotary: Rotary, head_dim: int) -> Values:
    """Rotary positions as transformers 5 has them, and the keys of before beside them."""
    section: Values = {"rope_type": "default", "rope_theta": rotary.theta}
    match rotary.stretch:
        case LinearStretch(factor):
            section |= {"rope_type": "linear", "factor": factor}
        case Llama3Stretch(factor, low, high, original):
            section |= {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
        case YarnStretch(factor, original, fast, slow, louder, truncate):
            section |= {
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": fast,
                "beta_slow": slow, "truncate": truncate,
            }  # fmt: skip
            section |= {} if louder is None else {"attention_factor": louder}
    values: Values = {"rope_theta": rotary.theta}
    if rotary.dims != head_dim:
        share = rotary.dims / head_dim
        section["partial_rotary_factor"] = values["partial_rotary_factor"] = share
    return {**values, "rope_parameters": section}


def _bamba(config: Config) -> Values:
    forward = first(config, FeedForward)
    assert forward is not None
    words = _layer_words(config, "attention", "mamba")
    return {
        **_mamba_keys(config), **_attention(config), "rms_norm_eps": config.final_norm.eps, "hidden_act": "silu",
        "intermediate_size": forward.d_hidden, "mlp_bias": forward.projection_bias,
        "attn_layer_indices": [i for i, word in enumerate(words) if word == "attention"],
    }  # fmt: skip


def _granite(config: Config) -> Values:
    attention, forward, experts = first(config, Attention), first(config, FeedForward), first(config, Experts)
    assert forward is not None
    branch = config.branches[0][0]
    values = {
        "rms_norm_eps": config.final_norm.eps, "hidden_act": "silu", "shared_intermediate_size": forward.d_hidden,
        "intermediate_size": forward.d_hidden if experts is None else experts.d_hidden, "mlp_bias": False,
        "num_local_experts": 0 if experts is None else experts.experts,
        "num_experts_per_tok": 0 if experts is None else experts.top_k,
        "embedding_multiplier": config.embedding_multiplier, "logits_scaling": 1 / config.logit_multiplier,
        "residual_multiplier": branch.residual, "layer_types": _layer_words(config, "attention", "mamba"),
    }  # fmt: skip
    values |= {**_mamba_keys(config), **_attention(config)}
    if attention is not None:
        values["attention_multiplier"] = attention.head_dim**-0.5 if attention.scale is None else attention.scale
        values["position_embedding_type"] = "nope" if attention.rotary is None else "rope"
    return values


def _falcon_h1(config: Config) -> Values:
    mamba, attention, forward = first(config, Mamba2), first(config, Attention), first(config, FeedForward)
    assert mamba is not None
    assert attention is not None
    assert forward is not None
    beside = {part.name: part for part in parts(config)}
    return {
        **_mamba_keys(config), **_attention(config), "rms_norm_eps": config.final_norm.eps, "hidden_act": "silu",
        "mamba_d_ssm": mamba.d_inner, "mamba_rms_norm": mamba.gate != "no_norm",
        "mamba_norm_before_gate": mamba.gate == "norm_first", "projectors_bias": mamba.out_bias,
        "intermediate_size": forward.d_hidden, "mlp_bias": forward.projection_bias,
        "embedding_multiplier": config.embedding_multiplier, "lm_head_multiplier": config.logit_multiplier,
        "key_multiplier": attention.key_multiplier, "attention_in_multiplier": beside["self_attn"].before,
        "attention_out_multiplier": beside["self_attn"].after, "ssm_in_multiplier": beside["mamba"].before,
        "ssm_out_multiplier": beside["mamba"].after, "ssm_multipliers": list(mamba.multipliers or (1.0,) * 5),
        "mlp_multipliers": [forward.gate_multiplier, forward.down_multiplier],
    }  # fmt: skip


def _nemotron_h(config: Config) -> Values:
    mamba, forward, experts = first(config, Mamba2), first(config, FeedForward, "mixer"), first(config, Experts)
    shared = first(config, FeedForward, "mixer.shared_experts")
    either = forward or shared
    values: Values = {
        **_attention(config), "layer_norm_epsilon": config.final_norm.eps, "rms_norm_eps": config.final_norm.eps,
        "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mlp_bias": bool(either and either.projection_bias),
        "layers_block_type": [_nemotron_word(layer[0].parts[0].block) for layer in config.branches],
    }  # fmt: skip
    if mamba is not None:
        values |= {
            "mamba_num_heads": mamba.n_heads, "mamba_head_dim": mamba.head_dim, "ssm_state_size": mamba.d_state,
            "n_groups": mamba.n_groups, "conv_kernel": mamba.d_conv, "use_bias": mamba.projection_bias,
            "mamba_proj_bias": mamba.projection_bias, "use_conv_bias": mamba.conv_bias,
            "time_step_min": mamba.dt_limits[0], "time_step_limit": _limits(mamba),
        }  # fmt: skip
    if forward is not None:
        values["intermediate_size"] = forward.d_hidden
    if experts is not None:
        values |= {
            "n_routed_experts": experts.experts, "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_hidden, "n_group": experts.routing.groups,
            "topk_group": experts.routing.chosen_groups, "norm_topk_prob": experts.routing.normalised,
            "routed_scaling_factor": experts.routing.scaling, "moe_latent_size": experts.latent,
            "n_shared_experts": 0 if shared is None else 1,
        }  # fmt: skip
        values |= {} if shared is None else {"moe_shared_expert_intermediate_size": shared.d_hidden}
    return values


def _nemotron_word(block: Block) -> str:
    match block:
        case Mamba2():
            return "mamba"
        case Attention():
            return "attention"
        case Experts():
            return "moe"
    return "mlp"


def _lfm2(config: Config) -> Values:
    mixer, forward, experts = first(config, ShortConv), first(config, FeedForward), first(config, Experts)
    attention = layers_of(config, Attention)
    values: Values = {
        **_attention(config), "norm_eps": config.final_norm.eps, "block_dim": config.d_model,
        "conv_bias": bool(mixer and mixer.with_bias), "block_auto_adjust_ff_dim": False, "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0, "full_attn_idxs": [i for i, has in enumerate(attention) if has],
        "layer_types": ["full_attention" if has else "conv" for has in attention],
    }  # fmt: skip
    if mixer is not None:
        values |= {"conv_L_cache": mixer.d_conv, "conv_dim": config.d_model}
    if forward is not None:
        values |= {"block_ff_dim": forward.d_hidden, "intermediate_size": forward.d_hidden}
    if experts is not None:
        values |= {
            "num_experts": experts.experts, "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_hidden, "norm_topk_prob": experts.routing.normalised,
            "use_expert_bias": experts.routing.corrected, "routed_scaling_factor": experts.routing.scaling,
            "num_dense_layers": layers_of(config, Experts).index(True),
        }  # fmt: skip
    return values


def _qwen(config: Config) -> Values:
    mixer, experts = first(config, DeltaRule), first(config, Experts)
    dense = [not has for has in layers_of(config, Experts)]
    forwards = [part.block for part in parts(config) if isinstance(part.block, FeedForward)]
    words = _layer_words(config, "full_attention", "linear_attention")
    values: Values = {
        **_attention(config), "rms_norm_eps": config.final_norm.eps, "hidden_act": "silu", "layer_types": words,
    }  # fmt: skip
    if "full_attention" in words:
        values["full_attention_interval"] = words.index("full_attention") + 1
    if mixer is not None:
        values |= {
            "linear_num_key_heads": mixer.key_heads, "linear_num_value_heads": mixer.value_heads,
            "linear_key_head_dim": mixer.key_dim, "linear_value_head_dim": mixer.value_dim,
            "linear_conv_kernel_dim": mixer.d_conv,
        }  # fmt: skip
    for forward in forwards:
        key = "shared_expert_intermediate_size" if forward.token_gate else "intermediate_size"
        values[key] = forward.d_hidden
    if experts is not None:
        values |= {
            "num_experts": experts.experts, "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_hidden, "norm_topk_prob": experts.routing.normalised,
            "decoder_sparse_step": 1, "mlp_only_layers": [i for i, has in enumerate(dense) if has],
        }  # fmt: skip
        values.setdefault("intermediate_size", experts.d_hidden)
    return values


_FAMILIES: Mapping[str, Callable[[Config], Values]] = {
    "mamba": _mamba, "falcon_mamba": _mamba, "mamba2": _mamba2, "bamba": _bamba, "granitemoehybrid": _granite,
    "falcon_h1": _falcon_h1, "nemotron_h": _nemotron_h, "lfm2": _lfm2, "lfm2_moe": _lfm2, "qwen3_next": _qwen,
    "qwen3_5_text": _qwen, "qwen3_5_moe_text": _qwen,
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
"""Families whose folders are known here."""
