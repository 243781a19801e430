"""Families as llama.cpp knows them: which architecture it has for each, and which options of a block it computes.

What is not known here is refused, as llama.cpp would refuse the file, or compute something else. Each line was run
(`tests/ssm_mp/runtimes/gguf/test_families.py`).

Dimensions: `d` model, `I` inner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.rotary import LinearStretch
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.config import Config

Positions = Literal["none", "halves", "pairs"]
"""Which dimensions llama.cpp turns together: half a rotation apart, or neighbours."""
Bias = Literal["qkv", "o", "feed_forward", "latent"]

SMALL_EPS = 1e-5
"""Up to which an epsilon of a norm may differ from the one that the file has for all of them."""
SMALL_STEP = 1e-3
"""The largest lower limit of time steps that is left out: llama.cpp has none."""


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has for a family.

    word: `general.architecture`. blocks: the kinds that it computes, a recurrent one first. second_norm, final_norm:
    names in the file.
    biases: of projections that it adds. inner_norms: what it does to Mamba-1's step, B and C.
    gates: of Mamba-2. gated: of feed-forwards and experts. scaled: whether scores of attention may have any scale.
    multipliers: whether the family has any that are multiplied into weights; granite_scales: whether it has keys for
    those of embeddings, residual branches and logits. routed: scores of its routers.
    """

    word: str
    blocks: tuple[type[Block], ...]
    second_norm: str = "ffn_norm.weight"
    final_norm: str = "output_norm.weight"
    biases: frozenset[Bias] = frozenset()
    positions: Positions = "none"
    inner_norms: Literal["none", "weightless", "weighted"] = "none"
    gates: tuple[str, ...] = ("gate_first",)
    activation: str = "silu"
    scaled: bool = False
    multipliers: bool = False
    granite_scales: bool = False
    routed: str = ""


_MAMBA = Architecture("mamba", (Mamba1,))
_GRANITE = Architecture(
    "granitehybrid", (Mamba2, Attention, FeedForward, Experts), biases=frozenset({"qkv", "o", "feed_forward"}),
    positions="pairs", scaled=True, granite_scales=True, routed="chosen_softmax",
)  # fmt: skip
_NEMOTRON = Architecture(
    "nemotron_h", (Mamba2, Attention, FeedForward), biases=frozenset({"qkv", "o", "feed_forward"}), activation="relu2",
)  # fmt: skip
_NEMOTRON_MOE = Architecture(
    "nemotron_h_moe", (Mamba2, Attention, FeedForward, Experts), biases=frozenset({"qkv", "o"}), activation="relu2",
    routed="sigmoid",
)  # fmt: skip
_LFM2 = Architecture(
    "lfm2", (ShortConv, Attention, FeedForward), final_norm="token_embd_norm.weight", positions="halves"
)
_LFM2_MOE = Architecture(
    "lfm2moe", (ShortConv, Attention, FeedForward, Experts), final_norm="token_embd_norm.weight", positions="halves",
    routed="sigmoid",
)  # fmt: skip
_ARCHITECTURES = {
    "mamba": _MAMBA,
    "falcon_mamba": Architecture("mamba", (Mamba1,), inner_norms="weightless"),
    "mamba2": Architecture("mamba2", (Mamba2,)),
    "granitemoehybrid": _GRANITE,
    "bamba": _GRANITE,
    "falcon_h1": Architecture(
        "falcon-h1", (Mamba2, Attention, FeedForward), second_norm="ffn_norm", positions="halves",
        biases=frozenset({"qkv", "feed_forward"}), gates=("gate_first", "no_norm"), multipliers=True,
    ),
    "nemotron_h": _NEMOTRON,
    "jamba": Architecture(
        "jamba", (Mamba1, Attention, FeedForward, Experts), inner_norms="weighted", routed="softmax"
    ),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2_MOE,
}  # fmt: skip


def architecture_of(config: Config) -> Architecture | None:
    """What llama.cpp has for a configuration's family; None where it has nothing."""
    found = _ARCHITECTURES.get(config.family)
    if found is _NEMOTRON and any(isinstance(block, Experts) for block in blocks_of(config)):
        return _NEMOTRON_MOE
    return found


def families() -> tuple[str, ...]:
    """Words of the families that llama.cpp has something for."""
    return tuple(_ARCHITECTURES)


def blocks_of(config: Config) -> list[Block]:
    """The different blocks of a configuration, in the order of the data flow."""
    return list(dict.fromkeys(part.block for layer in config.branches for branch in layer for part in branch.parts))


def unknown(config: Config) -> str | None:
    """The first thing about a configuration that llama.cpp does not know, with what it expects; None: it knows all."""
    known = architecture_of(config)
    if known is None:
        return (
            f"llama.cpp has no architecture for family {config.family!r}, or none that is written here; "
            f"expected one of {', '.join(families())}"
        )
    return next(_reasons(known, config), None)


def _reasons(known: Architecture, config: Config) -> Iterator[str]:
    word = f"llama.cpp's {known.word!r}"
    if config.position_table is not None:
        yield f"{word} has no learned positions (position_embedding)"
    if config.final_norm.kind != "rms":
        yield f"{word} has RMSNorms, this model LayerNorms with biases"
    eps = config.final_norm.eps
    for block in blocks_of(config):
        if not isinstance(block, known.blocks):
            yield f"{word} has no layers of kind {block.word!r}"
        match block:
            case Mamba1():
                yield from _of_mamba1(known, word, block, eps)
            case Mamba2():
                yield from _of_mamba2(known, word, block, eps)
            case Attention():
                yield from _of_attention(known, word, block)
            case FeedForward():
                yield from _of_feed_forward(known, word, block)
            case Experts():
                yield from _of_experts(known, word, block)
            case ShortConv() if block.with_bias:
                yield f"{word} has no biases of short convolutions"
    yield from _of_layers(known, word, config)


def _of_mamba1(known: Architecture, word: str, block: Mamba1, eps: float) -> Iterator[str]:
    if block.d_inner != 2 * block.d_model:
        yield f"{word} is always twice as wide inside as outside; this model is {block.d_inner} and {block.d_model}"
    if block.projection_bias:
        yield f"{word} has no biases of in_proj and out_proj"
    if block.d_conv < 2:
        yield f"{word} has convolutions over at least 2 tokens"
    held = "weighted" if block.inner_norms is not None else "none" if block.weightless_eps is None else "weightless"
    if held != known.inner_norms:
        yield f"{word} has {known.inner_norms} norms of step, B and C for this family, this model {held} ones"
    yield from _of_eps(word, None if block.inner_norms is None else block.inner_norms.eps, eps, "the inner norms")


def _of_mamba2(known: Architecture, word: str, block: Mamba2, eps: float) -> Iterator[str]:
    if block.projection_bias or block.out_bias:
        yield f"{word} has no biases of in_proj and out_proj"
    if block.d_conv < 2:
        yield f"{word} has convolutions over at least 2 tokens"
    if block.gate not in known.gates:
        yield f"{word} computes {' or '.join(known.gates)}, this model {block.gate} (of gate and norm)"
    low, high = block.dt_limits
    if low > SMALL_STEP or high is not None:
        shown = f"{low:g} to {'infinity' if high is None else f'{high:g}'}"
        yield f"{word} has no limits of the time step, which this model holds within {shown}"
    if block.gate != "no_norm":
        yield from _of_eps(word, block.norm_form.eps, eps, "the gated norm")
        if block.norm_groups != block.n_groups:
            yield f"{word} normalises by the {block.n_groups} groups of B and C, this model by {block.norm_groups}"
    if block.multipliers is not None and not known.multipliers:
        yield f"{word} has no multipliers of what in_proj gives"


def _of_eps(word: str, own: float | None, eps: float, what: str) -> Iterator[str]:
    if own is not None and own != eps and max(own, eps) > SMALL_EPS:
        yield f"{word} has one epsilon for all norms, {eps:g}; {what} have {own:g}"


def _of_attention(known: Architecture, word: str, block: Attention) -> Iterator[str]:
    if block.qkv_bias and "qkv" not in known.biases:
        yield f"{word} has no biases of queries, keys and values"
    if block.o_bias and "o" not in known.biases:
        yield f"{word} has no bias of attention's output"
    if block.scale not in (None, block.head_dim**-0.5) and not known.scaled:
        yield f"{word} scales scores by head_dim^-0.5 = {block.head_dim**-0.5:g}, this model by {block.scale:g}"
    if block.output_gate:
        yield f"{word} has no gate of attention's output"
    if (block.rotary is not None) != (known.positions != "none") and known.word != "granitehybrid":
        yield f"{word} has {'no ' if known.positions == 'none' else ''}rotary positions, unlike this model"
    if block.rotary is not None and not isinstance(block.rotary.stretch, LinearStretch | None):
        yield f"rotary positions stretched by {type(block.rotary.stretch).__name__} are not written, only linear ones"
    if block.key_multiplier != 1.0 and not known.multipliers:
        yield f"{word} has no multiplier of keys"
    if known.word == "jamba" and block.n_heads * block.head_dim != block.d_model:
        yield f"{word} has heads that make the width {block.d_model}, this model {block.n_heads} of {block.head_dim}"


def _of_feed_forward(known: Architecture, word: str, block: FeedForward) -> Iterator[str]:
    if block.projection_bias and "feed_forward" not in known.biases:
        yield f"{word} has no biases of feed-forwards"
    if block.activation != known.activation or (block.gated or block.fused) is not (known.activation == "silu"):
        yield f"{word} has feed-forwards with {known.activation}, unlike this model ({block.activation})"
    if block.token_gate:
        yield f"{word} has no gate of the feed-forward beside experts"


def _of_experts(known: Architecture, word: str, block: Experts) -> Iterator[str]:
    routing = block.routing
    if routing.scores != known.routed:
        yield f"{word} routes by {known.routed}, this model by {routing.scores}"
    if block.activation != known.activation:
        yield f"{word} has experts with {known.activation}, unlike this model ({block.activation})"
    if known.routed != "sigmoid" and (routing.normalised or routing.scaling != 1.0 or routing.corrected):
        yield f"{word} has other weights of experts than this model"
    if block.latent_bias and "latent" not in known.biases:
        yield f"{word} has no biases of latent projections"


def _of_layers(known: Architecture, word: str, config: Config) -> Iterator[str]:
    """What layers have to have in common, because the file says it once."""
    layers = config.branches
    rotary = {block.rotary for block in blocks_of(config) if isinstance(block, Attention)}
    if len(rotary) > 1:
        yield f"{word} has the same positions in all attention layers"
    residuals = {branch.residual for layer in layers for branch in layer}
    if residuals != {1.0} and (len(residuals) > 1 or not known.granite_scales):
        yield f"{word} has no multipliers of residual branches"
    if not known.multipliers and not known.granite_scales and (
        config.embedding_multiplier != 1.0 or config.logit_multiplier != 1.0
    ):  # fmt: skip
        yield f"{word} has no multipliers of embeddings and logits"
    kinds = {type(block) for block in blocks_of(config)}
    if known.word == "nemotron_h_moe":
        alone = [i for i, layer in enumerate(layers) if [type(p.block) for p in layer[0].parts] == [FeedForward]]
        if alone:
            yield f"{word} has no layers of plain feed-forwards beside layers of experts; layer {alone[0]} is one"
        if any(len(layer[0].parts) == 1 and isinstance(layer[0].parts[0].block, Experts) for layer in layers):
            yield f"{word} has a feed-forward that every token takes beside experts, this model none"
    if Attention in known.blocks and Attention not in kinds:
        yield f"{word} has layers with attention, this model none"
    if known.blocks[0] not in kinds:
        yield f"{word} has layers of kind {known.blocks[0].word!r}, this model none"
