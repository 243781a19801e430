"""The keys of a file: what llama.cpp has to know of a configuration beside the tensors.

Dimensions: `d` model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.rotary import LinearStretch, Rotary
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.config import Config
from ssm_mp.runtimes.gguf.architectures import Architecture

Value = str | int | float | bool | Sequence[int] | Sequence[str]
UNLIMITED = 1 << 20
"""The longest text of a model that does not say one, as llama.cpp's own converter states it."""
QUANTIZATION_VERSION = 2
"""Of the tensor types, `GGML_QNT_VERSION`."""
SOFTMAX, SIGMOID = 1, 2
"""Of `llama_expert_gating_func_type`."""

Kind = TypeVar("Kind", bound=Block)


def keys_of(known: Architecture, config: Config, name: str) -> Iterator[tuple[str, Value]]:
    """Key and value, in the order of the file; a number without a point is an unsigned integer there."""
    yield "general.architecture", known.word
    yield "general.type", "model"
    yield "general.name", name
    yield "general.quantization_version", QUANTIZATION_VERSION
    for key, value in _of_model(known, config):
        yield f"{known.word}.{key}", value


def _of_model(known: Architecture, config: Config) -> Iterator[tuple[str, Value]]:
    yield "vocab_size", config.vocabulary
    yield "context_length", config.max_tokens or UNLIMITED
    yield "embedding_length", config.d_model
    yield "block_count", config.n_layers
    yield "attention.layer_norm_rms_epsilon", config.final_norm.eps
    yield "attention.layer_norm_epsilon", config.final_norm.eps
    yield "feed_forward_length", _same([_hidden(blocks) for blocks in _layers(config)])
    yield from _of_attention(known, config)
    yield from _of_mixers(known, config)
    yield from _of_experts(config)
    if known.granite_scales:
        yield "embedding_scale", float(config.embedding_multiplier)
        yield "residual_scale", float(config.branches[0][0].residual)
        yield "logit_scale", 1.0 / config.logit_multiplier


def _layers(config: Config) -> list[list[Block]]:
    """Of each layer, its blocks."""
    return [[part.block for branch in layer for part in branch.parts] for layer in config.branches]


def _first(config: Config, kind: type[Kind]) -> Kind | None:
    """The first block of a kind."""
    return next((block for blocks in _layers(config) for block in blocks if isinstance(block, kind)), None)


def _same(values: list[int]) -> Value:
    """One number where it is the same in every layer, else one a layer."""
    return values[0] if len(set(values)) == 1 else values


def _hidden(blocks: Sequence[Block]) -> int:
    """Width of what a layer does to each token: of one of its experts, else of its feed-forward."""
    experts = [block.d_hidden for block in blocks if isinstance(block, Experts)]
    plain = [block.d_hidden for block in blocks if isinstance(block, FeedForward)]
    return (*experts, *plain, 0)[0]


def _of_attention(known: Architecture, config: Config) -> Iterator[tuple[str, Value]]:
    block = _first(config, Attention)
    if block is None:
        yield "attention.head_count", 0
        yield "attention.head_count_kv", 0
        return
    held = [next((one.n_kv_heads for one in blocks if isinstance(one, Attention)), 0) for blocks in _layers(config)]
    yield "attention.head_count", block.n_heads
    yield "attention.head_count_kv", _same(held)
    yield "attention.key_length", block.head_dim
    yield "attention.value_length", block.head_dim
    if known.scaled:
        yield "attention.scale", block.head_dim**-0.5 if block.scale is None else float(block.scale)
    yield from _of_rotary(block.rotary, block.head_dim)


def _of_rotary(rotary: Rotary | None, head: int) -> Iterator[tuple[str, Value]]:
    yield "rope.scaling.finetuned", rotary is not None  # Granite asks it whether there are positions at all
    if rotary is None:
        yield "rope.dimension_count", head
        return
    yield "rope.dimension_count", rotary.dims
    yield "rope.freq_base", float(rotary.theta)
    if isinstance(rotary.stretch, LinearStretch):
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", float(rotary.stretch.factor)


def _of_mixers(known: Architecture, config: Config) -> Iterator[tuple[str, Value]]:
    one, two, short = _first(config, Mamba1), _first(config, Mamba2), _first(config, ShortConv)
    if one is not None:
        yield "ssm.conv_kernel", one.d_conv
        yield "ssm.inner_size", one.d_inner
        yield "ssm.state_size", one.d_state
        yield "ssm.time_step_rank", one.dt_rank
        yield "ssm.dt_b_c_rms", known.inner_norms == "weightless"
    if two is not None:
        yield "ssm.conv_kernel", two.d_conv
        yield "ssm.inner_size", two.d_inner
        yield "ssm.state_size", two.d_state
        yield "ssm.time_step_rank", two.n_heads
        yield "ssm.group_count", two.n_groups
    if short is not None:
        yield "shortconv.l_cache", short.d_conv


def _of_experts(config: Config) -> Iterator[tuple[str, Value]]:
    block = _first(config, Experts)
    if block is None:
        return
    routing = block.routing
    layers = next(layer for layer in config.branches if any(_with_experts(branch.parts) for branch in layer))
    dense = config.branches.index(layers)
    parts = [part.block for branch in layers for part in branch.parts]
    shared = [other.d_hidden for other in parts if isinstance(other, FeedForward)]
    yield "expert_count", block.experts
    yield "expert_used_count", block.top_k
    yield "expert_feed_forward_length", block.d_hidden
    yield "expert_gating_func", SIGMOID if routing.scores == "sigmoid" else SOFTMAX
    yield "expert_weights_norm", routing.normalised
    yield "expert_weights_scale", float(routing.scaling)
    yield "expert_group_count", routing.groups
    yield "expert_group_used_count", routing.chosen_groups
    if shared:
        yield "expert_shared_count", 1
        yield "expert_shared_feed_forward_length", shared[0]
    yield "leading_dense_block_count", dense
    if block.latent is not None:
        yield "moe_latent_size", block.latent


def _with_experts(parts: Sequence[object]) -> bool:
    return any(isinstance(getattr(part, "block", None), Experts) for part in parts)
