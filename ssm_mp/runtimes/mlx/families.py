"""Which models mlx-lm 0.32 computes as they are meant: what it does otherwise, or has no key for, is refused.

All found by comparing it with transformers, and by reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.config import Config
from ssm_mp.runtimes.huggingface_config import first, layers_of, parts

_ABSENT = {
    "jamba": "with experts mlx-lm computes another model (a softmax of the chosen ones alone); without, not compared",
    "bamba": "mlx-lm does not know it",
    "itera": "it is of this project alone",
}
_EPS = 1e-5


def unfit(config: Config) -> str | None:
    """Why mlx-lm does not compute this model; None where it does."""
    return next(_reasons(config), None)


def _reasons(config: Config) -> Iterator[str]:
    if config.family in _ABSENT:
        yield f"family {config.family}: {_ABSENT[config.family]}"
        return
    yield from _FAMILIES[config.family](config)
    if config.family not in ("nemotron_h", "mamba", "falcon_mamba"):
        yield from _plain_groups(config)
    if config.family != "falcon_h1":
        yield from _equal_biases(config)
    yield from _attention(config)


def _plain_groups(config: Config) -> Iterator[str]:
    block = first(config, Mamba2)
    if block is not None and block.gate != "no_norm" and block.norm_groups > 1:
        yield (
            f"n_groups = {block.norm_groups}: mlx-lm normalises all channels of a {config.family} mixer together, and "
            "computes something else"
        )


def _equal_biases(config: Config) -> Iterator[str]:
    block = first(config, Mamba2)
    if block is not None and block.projection_bias != block.out_bias:
        yield "one of in_proj and out_proj has a bias and the other has none; mlx-lm has one key for both"


def _attention(config: Config) -> Iterator[str]:
    block = first(config, Attention)
    if block is None:
        return
    if block.qkv_bias != block.o_bias:
        yield "q_proj has a bias and o_proj has none, or the other way round; mlx-lm has one key for both"
    own_width = config.family in ("granitemoehybrid", "lfm2", "lfm2_moe")
    if own_width and block.head_dim * block.n_heads != config.d_model:
        yield f"attention heads of {block.head_dim}: mlx-lm knows only {config.d_model} / {block.n_heads}"
    if block.rotary is not None and block.rotary.stretch is not None:
        yield f"stretched rotary positions ({type(block.rotary.stretch).__name__}): not compared with mlx-lm's"
    if block.rotary is not None and block.rotary.dims != block.head_dim and block.qk_norm is None:
        yield "rotary positions of a part of each head: mlx-lm turns all of it"


def _mamba(config: Config) -> Iterator[str]:
    if config.position_table is not None or config.final_norm.kind != "rms":
        yield "learned positions and LayerNorm: mlx-lm's mamba has neither; only ONNX holds them"
    if config.final_norm.eps != _EPS:
        yield f"layer_norm_epsilon = {config.final_norm.eps:g}: mlx-lm has {_EPS:g} for the norms of every mamba"
    block = first(config, Mamba1)
    if config.family == "mamba" and block is not None and block.has_inner_norms:
        yield "norms of step, B and C: mlx-lm's mamba has none"


def _mamba2(config: Config) -> Iterator[str]:
    if config.final_norm.eps != _EPS:
        yield f"layer_norm_epsilon = {config.final_norm.eps:g}: mlx-lm has {_EPS:g} for the layers' norms of a mamba2"


def _granite(config: Config) -> Iterator[str]:
    if not any(layers_of(config, Attention)):
        yield "no layer has attention, whose sizes mlx-lm's config must name"
    counts = layers_of(config, Experts)
    if any(counts) and not all(counts):
        yield "only some layers have experts; mlx-lm has them in all or in none"


def _falcon_h1(config: Config) -> Iterator[str]:
    block = first(config, Mamba2)
    if block is not None and block.dt_limits != (0.0, None):
        yield f"time_step_limit = {block.dt_limits}: mlx-lm's falcon_h1 has none"


def _nemotron_h(config: Config) -> Iterator[str]:
    if config.tied:
        yield "a tied head: mlx-lm's nemotron_h has a head of its own"
    if not any(layers_of(config, Attention)) or not any(layers_of(config, Mamba2)):
        yield "layers of both attention and Mamba-2 are needed by mlx-lm's nemotron_h"
    experts = first(config, Experts)
    if experts is not None and experts.routing.groups > 1:
        yield f"n_group = {experts.routing.groups}: mlx-lm may choose experts of the groups that are left out"
    forwards = [part.block for part in parts(config) if isinstance(part.block, FeedForward)]
    biases = {forward.projection_bias for forward in forwards}
    if experts is not None and experts.latent is not None:
        biases.add(experts.latent_bias)
    if len(biases) > 1:
        yield "some feed-forwards have biases and others have none; mlx-lm has one key for all"


def _lfm2(config: Config) -> Iterator[str]:
    if not config.tied:
        yield "an untied head: mlx-lm's lfm2 uses the embedding"
    if not any(layers_of(config, Attention)):
        yield "no layer has attention, which mlx-lm's lfm2 needs"


def _qwen(config: Config) -> Iterator[str]:
    attention = layers_of(config, Attention)
    if True not in attention:
        yield "no layer has attention, which mlx-lm's qwen models need"
        return
    interval = attention.index(True) + 1
    if attention != [(i + 1) % interval == 0 for i in range(len(attention))] or not first(config, DeltaRule):
        yield f"attention in layers {[i for i, has in enumerate(attention) if has]}: mlx-lm knows only every n-th layer"
    block = first(config, Attention)
    if block is not None and not block.output_gate:
        yield "attention without an output gate: mlx-lm's always has one"
    experts = layers_of(config, Experts)
    if config.family != "qwen3_next" and any(experts) and not all(experts):
        yield "only some layers have experts; mlx-lm has them in all or in none"


_FAMILIES: Mapping[str, Callable[[Config], Iterator[str]]] = {
    "mamba": _mamba, "falcon_mamba": _mamba, "mamba2": _mamba2, "granitemoehybrid": _granite, "falcon_h1": _falcon_h1,
    "nemotron_h": _nemotron_h, "lfm2": _lfm2, "lfm2_moe": _lfm2, "qwen3_next": _qwen, "qwen3_5_text": _qwen,
    "qwen3_5_moe_text": _qwen,
}  # fmt: skip
