"""Tiny random models of every family that MLX or compressed-tensors holds, of sizes that groups divide.

The width is a multiple of 32 only, so that groups of ours reach from a row into the next; inner widths are multiples of
64 or of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from ssm_mp.blocks.experts import Experts
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import HasConfig
from ssm_mp.conversion.regroup import regrouped
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.verify import divergences, ours, unequal_weights
from tests.families.tiny_models import randomise

VOCABULARY = 101
_WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 96}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 24, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
_GRANITE = {
    **_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 3, "shared_intermediate_size": 64, "intermediate_size": 64,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 1.7,
}  # fmt: skip
_NEMOTRON = {
    **_WIDTH, **_HEADS, "head_dim": 16, "hybrid_override_pattern": "M-M*", "intermediate_size": 64,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 1.5,
}  # fmt: skip
_FALCON_H1 = {
    **_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 2, "intermediate_size": 64, "mamba_d_head": 16,
    "mamba_d_ssm": 128, "mamba_rms_norm": True, "embedding_multiplier": 1.4, "lm_head_multiplier": 0.6,
    "key_multiplier": 0.7, "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.9, "ssm_multipliers": [0.8, 1.2, 0.7, 1.1, 0.6], "mlp_multipliers": [1.3, 0.7],
}  # fmt: skip
_LFM2 = {
    **_WIDTH, **_HEADS, "num_hidden_layers": 3, "intermediate_size": 96, "block_multiple_of": 32,
    "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip
_DELTA = {
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-4, "num_hidden_layers": 4,
    "intermediate_size": 64, "full_attention_interval": 2,
}  # fmt: skip
_QWEN_EXPERTS = {
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2
}  # fmt: skip

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mamba": ("Mamba", {**_WIDTH, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 32}),
    "mamba-untied-biases": (
        "Mamba",
        {
            **_WIDTH, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 7, "tie_word_embeddings": False,
            "use_bias": True, "use_conv_bias": False,
        },
    ),
    "falcon_mamba": ("FalconMamba", {**_WIDTH, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 32}),
    "mamba2": (
        "Mamba2",
        {
            **_WIDTH, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 24, "state_size": 16, "n_groups": 1,
            "chunk_size": 16, "time_step_limit": (0.05, 0.4), "use_bias": True,
        },
    ),
    "bamba": (
        "Bamba",
        {**_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 3, "intermediate_size": 64, "attn_layer_indices": [1]},
    ),
    "granite": ("GraniteMoeHybrid", {**_GRANITE, "num_local_experts": 0}),
    "granite-rope-biases": (
        "GraniteMoeHybrid",
        {
            **_GRANITE, "num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True,
            "mamba_proj_bias": True, "tie_word_embeddings": False, "time_step_limit": (0.05, 0.4),
        },
    ),
    "granite-experts": ("GraniteMoeHybrid", {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon_h1": ("FalconH1", {**_FALCON_H1, "mamba_norm_before_gate": False}),
    "falcon_h1-norm-first": ("FalconH1", _FALCON_H1),
    "falcon_h1-biases": (
        "FalconH1",
        {
            **_FALCON_H1, "projectors_bias": True, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True,
            "mamba_rms_norm": False, "tie_word_embeddings": True, "mamba_n_groups": 2,
        },
    ),
    "nemotron_h": ("NemotronH", _NEMOTRON),
    "nemotron_h-experts": ("NemotronH", {**_NEMOTRON, "hybrid_override_pattern": "M*-E"}),
    "nemotron_h-latent": ("NemotronH", {**_NEMOTRON, "hybrid_override_pattern": "M*E", "moe_latent_size": 64}),
    "lfm2": ("Lfm2", _LFM2),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **_LFM2, "moe_intermediate_size": 64, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "qwen3_next": ("Qwen3Next", {**_WIDTH, **_HEADS, **_DELTA, **_QWEN_EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_5_text": ("Qwen3_5", {**_WIDTH, **_HEADS, **_DELTA}),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe",
        {**_WIDTH, **_HEADS, **{k: v for k, v in _DELTA.items() if k != "intermediate_size"}, **_QWEN_EXPERTS},
    ),
}  # fmt: skip
"""Name → class of transformers, and its options."""


def written_by_transformers(name: str, folder: Path) -> Path:
    """A case's folder."""
    kind, options = CASES[name]
    text = "Text" if kind.startswith("Qwen3_5") else ""
    with torch.random.fork_rng(devices=[]):
        config = getattr(transformers, f"{kind}{text}Config")(**options)
        model: PreTrainedModel = randomise(getattr(transformers, f"{kind}ForCausalLM")(config))
    model.save_pretrained(folder)
    return folder


@cache
def checkpoint_of(name: str) -> Checkpoint:
    """A case as it is read from its folder; the experts of a layer together."""
    with TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(written_by_transformers(name, Path(folder)))
    return regrouped(checkpoint, "together") if _has_experts(checkpoint) else checkpoint


def _has_experts(source: HasConfig) -> bool:
    blocks = (part.block for layer in source.config.branches for branch in layer for part in branch.parts)
    return any(isinstance(block, Experts) for block in blocks)


def answered(reader: Callable[[str, str, str], None], model: Path, ids: torch.Tensor, folder: Path) -> np.ndarray:
    """What a runner says of ids `[w, l]`, in this process: log-probabilities `[w, l, V]`."""
    np.save(folder / "ids.npy", ids.numpy())
    reader(str(model), str(folder / "ids.npy"), str(folder / "out.npy"))
    found: np.ndarray = np.load(folder / "out.npy")
    return found


def require_true_folder(format_: Format, item: Exportable, path: Path) -> None:
    """Write the folder; weights equal bit for bit, bytes as predicted."""
    assert format_.refusal_of(item) is None
    format_.write(item, path)
    assert unequal_weights(format_, item, path) == []
    encodings = [format_.encoding(part, item.precision(part.name), item.config) for part in item.components]
    assert None not in encodings
    assert format_.tensor_bytes(path) == sum(encoding.bytes for encoding in encodings if encoding is not None)


def divergence(item: Exportable, found: np.ndarray, ids: torch.Tensor) -> tuple[float, float]:
    """Of what a runtime found from our own evaluation: mean KL, and the largest difference of log-probabilities."""
    mine = ours(item.model, ids.numpy()).log_probabilities
    return float(divergences(mine, found).mean()), float(np.abs(mine - found).max())
