"""Tiny random models of the families, as transformers builds, runs and writes them: one case a family and option.

The sizes are odd on purpose, and no parameter has the value that it is initialised with, so that an error in
any of them is seen in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 101
SEED = 7


@dataclass(frozen=True)
class Case:
    """A family with certain options.

    Attributes:
        name: family and what is special, as `mamba2/groups-2`.
        family: the `model_type` of its config.
        make: builds the model; always the same numbers.
    """

    name: str
    family: str
    make: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding after a prompt.

    Attributes:
        tokens: `[b, steps]`: the tokens fed one by one; the first follows from the prompt.
        logits: `[b, steps, V]` float32: after each of them.
    """

    tokens: Tensor
    logits: Tensor


def written(case: Case, folder: Path, shard_size: str = "1GB", dtype: torch.dtype = torch.float32) -> Path:
    """The case's checkpoint in `folder`, as `save_pretrained` writes it; a small `shard_size` gives shards."""
    model: Any = case.make()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def random_ids(length: int, batch: int = 2, seed: int = 3) -> Tensor:
    """Random tokens `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def expected_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits `[b, l, V]` of whole windows, float32, without a cache."""
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits.float()


def expected_decoding(model: PreTrainedModel, ids: Tensor, steps: int) -> Decoding:
    """`steps` greedy tokens after the prompt `ids` `[b, l]`, by the carried state.

    transformers applies a limit of the time step to a prompt but not to decoded tokens. Where a model has such a
    limit, every step is a whole window here, which is what the carried state should give.
    """
    if limits_steps(model):
        return _by_windows(model, ids, steps)
    tokens, logits = [], []
    with torch.no_grad():
        out = model(ids, use_cache=True, **_positions(model, 0, ids.shape[1]))
        for step in range(steps):
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            # without positions of its own, Bamba in transformers 5.23 decodes every token at position 0
            positions = _positions(model, ids.shape[1] + step, 1)
            out = model(token, use_cache=True, **_cache(out), **positions)
            tokens.append(token)
            logits.append(out.logits[:, -1:].float())
    return Decoding(torch.cat(tokens, dim=1), torch.cat(logits, dim=1))


def limits_steps(model: PreTrainedModel) -> bool:
    """Whether the model holds its time steps in any limits but none, as Nemotron-H does by its `time_step_min`."""
    limits = [getattr(module, "time_step_limit", None) or (0.0, math.inf) for module in model.modules()]
    return any(low > 1e-9 or high != math.inf for low, high in limits)


def _by_windows(model: PreTrainedModel, ids: Tensor, steps: int) -> Decoding:
    logits = expected_logits(model, ids)
    for _ in range(steps):
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = expected_logits(model, ids)
    return Decoding(ids[:, -steps:], logits[:, -steps:])


def _positions(model: PreTrainedModel, start: int, count: int) -> dict[str, Tensor]:
    """`position_ids` for the models that have attention."""
    if model.config.model_type in ("mamba2", "falcon_mamba"):
        return {}
    return {"position_ids": torch.arange(start, start + count)[None]}


def _cache(out: Any) -> dict[str, Any]:
    name = "cache_params" if hasattr(out, "cache_params") else "past_key_values"
    return {name: getattr(out, name)}


def randomise(model: PreTrainedModel, seed: int = SEED) -> PreTrainedModel:
    """Random numbers in every parameter and every stored buffer, in place: norms near 1 (or 0 where 1 is added)."""
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            tensor.copy_(_value(name, tensor, generator))
    model.train(False)
    return model


def _value(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    normal = torch.randn(tensor.shape, generator=generator)
    uniform = torch.rand(tensor.shape, generator=generator)
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind == "A_log":
        return (0.5 + 8 * uniform).log()
    if kind == "dt_bias" or name.endswith("dt_proj.bias"):
        return -4.5 * uniform  # steps of 0.01 to 0.7
    if kind == "D":
        return 1 + 0.5 * normal
    if "norm" in kind:
        return tensor + 0.2 * normal
    if kind == "bias" or kind.endswith("_bias"):
        return 0.3 * normal
    if "embed" in kind:
        return normal
    if "conv" in kind:
        return 0.5 * normal
    return normal / math.sqrt(tensor.shape[-1])


def _made(model: str, config: str, options: Mapping[str, Any]) -> Callable[[], PreTrainedModel]:
    """Builds `transformers.<model>` from `transformers.<config>(**options)` on demand."""

    def make() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            built: PreTrainedModel = getattr(transformers, model)(getattr(transformers, config)(**options))
        return randomise(built)

    return make


def _cases(family: str, model: str, common: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """One case for each of `options`, which stand above the `common` ones."""
    config = model.replace("ForCausalLM", "Config")
    return [
        Case(f"{family}/{name}", family, _made(model, config, {**common, **special}))
        for name, special in options.items()
    ]


_WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 48}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MAMBA = {
    "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip

_MAMBA2 = _cases(
    "mamba2", "Mamba2ForCausalLM",
    {
        **_WIDTH, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 16, "state_size": 24, "n_groups": 1,
        "chunk_size": 16,
    },
    {
        "plain": {},
        "groups-2": {"n_groups": 2},
        "groups-4": {"n_groups": 4, "num_heads": 8, "head_dim": 12},
        "biases": {"use_bias": True},
        "no-convolution-bias": {"use_conv_bias": False},
        "tied": {"tie_word_embeddings": True, "n_groups": 2},
        "step-limit": {"time_step_limit": (0.05, 0.4)},
        "kernel-3": {"conv_kernel": 3, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
    },
)  # fmt: skip
_FALCON_MAMBA = _cases(
    "falcon_mamba", "FalconMambaForCausalLM",
    {**_WIDTH, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 7, "expand": 2},
    {
        "plain": {"tie_word_embeddings": False},
        "tied": {"tie_word_embeddings": True},
        "biases": {"use_bias": True, "mixer_rms_eps": 1e-2},
        "no-convolution-bias": {"use_conv_bias": False, "conv_kernel": 3},
    },
)  # fmt: skip
_BAMBA = _cases(
    "bamba", "BambaForCausalLM",
    {**_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 3, "intermediate_size": 72, "attn_layer_indices": [1]},
    {
        "plain": {},
        "groups-2": {"mamba_n_groups": 2},
        "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
        "tied": {"tie_word_embeddings": True, "attn_layer_indices": [0, 2], "rms_norm_eps": 1e-3},
        "step-limit": {"time_step_limit": (0.05, 0.4)},
    },
)  # fmt: skip
_GRANITE = _cases(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM",
    {
        **_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 3, "shared_intermediate_size": 70,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "position_embedding_type": "nope", "tie_word_embeddings": True,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.25, "logits_scaling": 1.7,
    },
    {
        "dense": {},
        "untied": {"tie_word_embeddings": False, "mamba_n_groups": 2},
        "rope": {"position_embedding_type": "rope"},
        "biases": {"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
        "experts": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24},
        "experts-rope": {
            "num_local_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 24, "mamba_n_groups": 2,
            "position_embedding_type": "rope", "attention_bias": True, "tie_word_embeddings": False,
        },
        "many-experts": {"num_local_experts": 18, "num_experts_per_tok": 4, "intermediate_size": 8},
        "step-limit": {"time_step_limit": (0.05, 0.4)},
    },
)  # fmt: skip
_NEMOTRON_H = _cases(
    "nemotron_h", "NemotronHForCausalLM",
    {
        **_WIDTH, **_HEADS, "head_dim": 12, "hybrid_override_pattern": "M-M*", "intermediate_size": 72,
        "mamba_num_heads": 6, "mamba_head_dim": 12, "ssm_state_size": 24, "n_groups": 2, "chunk_size": 16,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 1.5,
    },
    {
        "dense": {},
        "groups-3": {"n_groups": 3},
        "own-widths": {"hybrid_override_pattern": "MM*-", "mamba_head_dim": 14},
        "biases": {"use_bias": True, "mlp_bias": True, "use_conv_bias": False},
        "experts": {"hybrid_override_pattern": "M*-E"},
        "experts-groups": {"hybrid_override_pattern": "ME*E", "n_group": 3, "topk_group": 2},
        "experts-not-normalised": {"hybrid_override_pattern": "M*-E", "norm_topk_prob": False, "mlp_bias": True},
        "experts-latent": {"hybrid_override_pattern": "M*E", "moe_latent_size": 40},
        "many-experts": {"hybrid_override_pattern": "ME", "n_routed_experts": 20, "num_experts_per_tok": 5},
        "step-floor": {"time_step_min": 0.1},
        "no-step-floor": {"time_step_min": 1e-12, "hybrid_override_pattern": "M-*E"},
    },
)  # fmt: skip
_FALCON_H1 = _cases(
    "falcon_h1", "FalconH1ForCausalLM",
    {
        **_WIDTH, **_HEADS, **_MAMBA, "num_hidden_layers": 2, "intermediate_size": 72, "mamba_d_head": 12,
        "mamba_d_ssm": 72, "mamba_n_groups": 2, "mamba_rms_norm": True,
        "embedding_multiplier": 1.4, "lm_head_multiplier": 0.6, "key_multiplier": 0.7, "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.9,
        "ssm_multipliers": [0.8, 1.2, 0.7, 1.1, 0.6], "mlp_multipliers": [1.3, 0.7],
    },
    {
        "norm-then-gate": {},
        "gate-then-norm": {"mamba_norm_before_gate": False},
        "no-norm": {"mamba_rms_norm": False},
        "biases": {
            "projectors_bias": True, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True,
            "mamba_conv_bias": False, "mamba_rms_norm": False,
        },
        "groups-1": {"mamba_n_groups": 1, "mamba_norm_before_gate": False},
        "head-width": {
            "head_dim": 14, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
        "expanded": {"mamba_d_ssm": None, "mamba_d_head": 16},
        "step-limit": {"time_step_limit": (0.05, 0.4)},
    },
)  # fmt: skip
_JAMBA = _cases(
    "jamba", "JambaForCausalLM",
    {
        **_WIDTH, **_HEADS, "num_hidden_layers": 4, "intermediate_size": 72, "mamba_d_state": 5, "mamba_dt_rank": 7,
        "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    {
        "experts": {},
        "dense": {"num_experts": 1, "num_experts_per_tok": 1},
        "biases": {"mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
        "experts-beside-attention": {"expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 0},
    },
)  # fmt: skip
_LFM2 = _cases(
    "lfm2", "Lfm2ForCausalLM",
    {
        **_WIDTH, **_HEADS, "num_hidden_layers": 3, "intermediate_size": 100, "block_multiple_of": 24,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    {
        "plain": {},
        "width-as-given": {"block_auto_adjust_ff_dim": False},
        "biases": {"conv_bias": True, "conv_L_cache": 4, "block_ffn_dim_multiplier": 1.3, "norm_eps": 1e-3},
        "untied": {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    },
)  # fmt: skip
_LFM2_MOE = _cases(
    "lfm2_moe", "Lfm2MoeForCausalLM",
    {
        **_WIDTH, **_HEADS, "num_hidden_layers": 4, "intermediate_size": 72, "moe_intermediate_size": 24,
        "num_dense_layers": 1, "num_experts": 5, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    {
        "plain": {},
        "not-normalised": {"norm_topk_prob": False},
        "no-expert-bias": {"use_expert_bias": False, "conv_bias": True},
        "untied": {"tie_word_embeddings": False, "num_dense_layers": 2},
    },
)  # fmt: skip
_DELTA = {
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 10, "linear_value_head_dim": 14,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-4,
}  # fmt: skip
"""With an epsilon of 1e-6 the mixers' norms magnify the rounding of heads that nearly vanish a thousandfold, here and
in transformers alike (both held against float64); then no two ways to add up agree to 1e-5."""
_QWEN3_NEXT = _cases(
    "qwen3_next", "Qwen3NextForCausalLM",
    {
        **_WIDTH, **_HEADS, **_DELTA, "num_hidden_layers": 3, "intermediate_size": 72, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    {
        "plain": {},
        "not-normalised": {"norm_topk_prob": False, "mlp_only_layers": [1]},
        "biases": {"attention_bias": True, "tie_word_embeddings": True},
        "equal-heads": {"linear_num_value_heads": 2, "decoder_sparse_step": 2},
        "many-experts": {"num_experts": 18, "num_experts_per_tok": 4},
    },
)  # fmt: skip
_QWEN3_5_TEXT_OPTIONS = {
    **_WIDTH, **_HEADS, **_DELTA, "num_hidden_layers": 4, "intermediate_size": 72,
}  # fmt: skip


def _qwen3_5_text(**options: Any) -> Callable[[], PreTrainedModel]:
    return _made("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_QWEN3_5_TEXT_OPTIONS, **options})


_STRETCHED = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
_QWEN3_5_MOE_OPTIONS = {
    **_QWEN3_5_TEXT_OPTIONS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 5,
    "num_experts_per_tok": 2,
}  # fmt: skip
del _QWEN3_5_MOE_OPTIONS["intermediate_size"]


def _qwen3_5_moe_text(**options: Any) -> Callable[[], PreTrainedModel]:
    return _made("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**_QWEN3_5_MOE_OPTIONS, **options})


def _qwen3_5(kind: str, text: Mapping[str, Any]) -> Callable[[], PreTrainedModel]:
    """The folder of the hub: text and vision in one. Text goes through it as through the text model alone."""
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
        "num_position_embeddings": 16,
    }  # fmt: skip
    options = {
        "text_config": dict(text), "vision_config": vision,
        "image_token_id": 96, "video_token_id": 97, "vision_start_token_id": 98, "vision_end_token_id": 99,
    }  # fmt: skip
    return _made(f"{kind}ForConditionalGeneration", f"{kind}Config", options)


_QWEN3_5 = [
    Case("qwen3_5_text/plain", "qwen3_5_text", _qwen3_5_text()),
    Case("qwen3_5_text/tied", "qwen3_5_text", _qwen3_5_text(tie_word_embeddings=True, attention_bias=True)),
    Case("qwen3_5_text/interval-2", "qwen3_5_text", _qwen3_5_text(full_attention_interval=2, linear_num_value_heads=2)),
    Case("qwen3_5_text/stretched", "qwen3_5_text", _qwen3_5_text(rope_parameters=_STRETCHED)),
    Case("qwen3_5/text-and-vision", "qwen3_5", _qwen3_5("Qwen3_5", _QWEN3_5_TEXT_OPTIONS)),
    Case("qwen3_5_moe_text/plain", "qwen3_5_moe_text", _qwen3_5_moe_text()),
    Case("qwen3_5_moe_text/many-experts", "qwen3_5_moe_text", _qwen3_5_moe_text(num_experts=18, num_experts_per_tok=4)),
    Case("qwen3_5_moe/text-and-vision", "qwen3_5_moe", _qwen3_5("Qwen3_5Moe", _QWEN3_5_MOE_OPTIONS)),
]

CASES: tuple[Case, ...] = (
    *_MAMBA2, *_FALCON_MAMBA, *_BAMBA, *_GRANITE, *_NEMOTRON_H, *_FALCON_H1, *_JAMBA, *_LFM2, *_LFM2_MOE,
    *_QWEN3_NEXT, *_QWEN3_5,
)  # fmt: skip


def cases_of(family: str) -> list[Case]:
    """The cases of one `model_type`."""
    return [case for case in CASES if case.family == family]
