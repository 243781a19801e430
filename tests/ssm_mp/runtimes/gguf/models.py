"""Tiny random models of the families that llama.cpp knows, with rows that blocks of 32 divide; one case an option."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from tests.families.tiny_models import VOCABULARY, Case, randomise, written

_WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mamba": ("Mamba", {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32, "expand": 2}),
    "falcon_mamba": ("FalconMamba", {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32, "expand": 2}),
    "mamba2": (
        "Mamba2", {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1,
        "chunk_size": 16},
    ),
    "bamba": ("Bamba", {
        **_HEADS, **_MAMBA, "num_hidden_layers": 3, "intermediate_size": 96, "attn_layer_indices": [1],
    }),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **_HEADS, **_MAMBA, "num_hidden_layers": 3, "shared_intermediate_size": 96,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "position_embedding_type": "nope", "tie_word_embeddings": True,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.25, "logits_scaling": 1.7,
    }),
    "nemotron_h": ("NemotronH", {
        **_HEADS, "head_dim": 16, "hybrid_override_pattern": "M-M*", "intermediate_size": 96, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
        "routed_scaling_factor": 1.5,
    }),
    "falcon_h1": ("FalconH1", {
        **_HEADS, **_MAMBA, "num_hidden_layers": 2, "intermediate_size": 96, "mamba_d_ssm": 128, "mamba_n_groups": 2,
        "mamba_rms_norm": True, "mamba_norm_before_gate": False, "embedding_multiplier": 1.4,
        "lm_head_multiplier": 0.6, "key_multiplier": 0.7, "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.9,
        "ssm_multipliers": [0.8, 1.2, 0.7, 1.1, 0.6], "mlp_multipliers": [1.3, 0.7],
    }),
    "jamba": ("Jamba", {
        **_HEADS, "num_hidden_layers": 4, "intermediate_size": 96, "mamba_d_state": 8, "mamba_dt_rank": 32,
        "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    }),
    "lfm2": ("Lfm2", {
        **_HEADS, "num_hidden_layers": 3, "intermediate_size": 96, "block_multiple_of": 32,
        "layer_types": ["conv", "full_attention", "conv"],
    }),
    "lfm2_moe": ("Lfm2Moe", {
        **_HEADS, "num_hidden_layers": 4, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_dense_layers": 1, "num_experts": 5, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }),
}  # fmt: skip
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mamba/plain": {},
    "mamba/untied": {"tie_word_embeddings": False},
    "mamba/no-convolution-bias": {"use_conv_bias": False},
    "falcon_mamba/plain": {"tie_word_embeddings": False},
    "falcon_mamba/tied": {"tie_word_embeddings": True},
    "falcon_mamba/one-epsilon": {"tie_word_embeddings": False, "mixer_rms_eps": 1e-5},
    "mamba2/plain": {},
    "mamba2/groups-2": {"n_groups": 2},
    "mamba2/groups-4": {"n_groups": 4, "tie_word_embeddings": True},
    "mamba2/no-convolution-bias": {"use_conv_bias": False, "conv_kernel": 3},
    "bamba/plain": {},
    "bamba/biases": {"attention_bias": True, "mlp_bias": True, "mamba_conv_bias": False, "mamba_n_groups": 2},
    "bamba/tied": {"tie_word_embeddings": True, "attn_layer_indices": [0, 2]},
    "granitemoehybrid/dense": {},
    "granitemoehybrid/untied": {"tie_word_embeddings": False, "mamba_n_groups": 2},
    "granitemoehybrid/rope": {"position_embedding_type": "rope"},
    "granitemoehybrid/stretched": {
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "granitemoehybrid/biases": {"attention_bias": True, "mamba_conv_bias": False},
    "granitemoehybrid/experts": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoehybrid/many-experts": {"num_local_experts": 18, "num_experts_per_tok": 4, "intermediate_size": 32},
    "nemotron_h/dense": {},
    "nemotron_h/biases": {"mlp_bias": True, "use_conv_bias": False},
    "nemotron_h/experts": {"hybrid_override_pattern": "M*ME"},
    "nemotron_h/experts-groups": {"hybrid_override_pattern": "ME*E", "n_group": 3, "topk_group": 2},
    "nemotron_h/experts-not-normalised": {"hybrid_override_pattern": "M*E", "norm_topk_prob": False},
    "nemotron_h/experts-latent": {"hybrid_override_pattern": "M*E", "moe_latent_size": 32},
    "nemotron_h/many-experts": {"hybrid_override_pattern": "M*E", "n_routed_experts": 20, "num_experts_per_tok": 5},
    "falcon_h1/gate-then-norm": {},
    "falcon_h1/no-norm": {"mamba_rms_norm": False},
    "falcon_h1/biases": {
        "attention_bias": False, "mlp_bias": True, "mamba_conv_bias": False, "mamba_rms_norm": False,
    },
    "falcon_h1/tied": {
        "head_dim": 32, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "jamba/experts": {},
    "jamba/dense": {"num_experts": 1, "num_experts_per_tok": 1},
    "jamba/tied": {"mamba_conv_bias": False, "tie_word_embeddings": True},
    "lfm2/plain": {},
    "lfm2/untied": {"tie_word_embeddings": False, "conv_L_cache": 4},
    "lfm2_moe/plain": {},
    "lfm2_moe/no-expert-bias": {"use_expert_bias": False},
}  # fmt: skip
NAMES = tuple(_OPTIONS)


def case_of(name: str, **further: Any) -> Case:
    """A case by name, with further options."""
    family = name.partition("/")[0]
    model, common = _FAMILIES[family]
    options = {**_WIDTH, **common, **_OPTIONS.get(name, {}), **further}

    def make() -> transformers.PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            built = getattr(transformers, f"{model}ForCausalLM")(getattr(transformers, f"{model}Config")(**options))
        return randomise(built)

    return Case(name, family, make)


@cache
def checkpoint_of(name: str, **further: Any) -> Checkpoint:
    """The checkpoint of a case, written by transformers and read."""
    with TemporaryDirectory() as folder:
        return load_checkpoint(written(case_of(name, **further), Path(folder)))
