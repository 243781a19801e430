"""Blocks as llama.cpp holds them: names, shapes and arrangement of their tensors, the same in every architecture.

Dimensions: `d` model, `I` inner, `H` heads, `P` channels of a head, `N` state, `R` step rank, `G` groups, `K`
convolution kernel, `W` convolved channels, `X` experts, `E` hidden, `e` attention head, `r` dimensions of it that are
turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import PIECES, Mamba2
from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.config import Part
from ssm_mp.runtimes.gguf.tensors import Entry, Rows, entry, matrix, zeros


@dataclass(frozen=True)
class Place:
    """Where a block stands.

    at: in the model, `layers.3.mamba`. blk: in the file, `blk.3`. neighbours: whether rotary positions turn pairs of
    neighbours there, where ours turn halves. shared: whether it is the feed-forward beside experts. eps: of all norms
    in the file.
    """

    at: str
    blk: str
    part: Part
    neighbours: bool = False
    shared: bool = False
    eps: float = 1e-5

    def name(self, leaf: str) -> str:
        """A component's name in the model."""
        return self.part.block.component(self.at, leaf)

    def linear(
        self, name: str, leaf: str, n: int, k: int, *, factor: float = 1.0, biased: bool = False, after: float = 1.0,
        order: Sequence[int] | None = None,
    ) -> Iterator[Entry]:  # fmt: skip
        """A projection `[n, k]`. factor: of its weight; after: of its bias; order: of its rows."""
        at = self.name(leaf)
        yield matrix(f"{self.blk}.{name}.weight", (n, k), Rows(f"{at}.weight", order, factor))
        if biased:
            rows = (Rows(f"{at}.bias", order, after),)
            yield Entry(f"{self.blk}.{name}.bias", (n,), rows)

    def convolution(self, name: str, leaf: str, channels: int, kernel: int, biased: bool) -> Iterator[Entry]:
        """A depthwise convolution, whose bias llama.cpp always adds."""
        at, there = self.name(leaf), f"{self.blk}.{name}"
        yield entry(f"{there}.weight", (channels, kernel), f"{at}.weight")
        yield entry(f"{there}.bias", (channels,), f"{at}.bias") if biased else zeros(f"{there}.bias", channels, at)


def entries(place: Place) -> Iterator[Entry]:
    """The tensors of the block at a place."""
    block: Block = place.part.block
    match block:
        case Mamba1():
            yield from _mamba1(place, block)
        case Mamba2():
            yield from _mamba2(place, block)
        case Attention():
            yield from _attention(place, block)
        case FeedForward():
            yield from _feed_forward(place, block)
        case Experts():
            yield from _experts(place, block)
        case ShortConv():
            yield from _short_conv(place, block)


def _mamba1(place: Place, block: Mamba1) -> Iterator[Entry]:
    d, inner, rank, state, blk = block.d_model, block.d_inner, block.dt_rank, block.d_state, place.blk
    yield from place.linear("ssm_in", "in_proj", 2 * inner, d)
    yield from place.convolution("ssm_conv1d", "conv1d", inner, block.d_conv, block.conv_bias)
    # a norm without weights and with another epsilon is that of a multiple with the file's epsilon
    factor = 1.0 if block.weightless_eps is None else math.sqrt(place.eps / block.weightless_eps)
    yield from place.linear("ssm_x", "x_proj", rank + 2 * state, inner, factor=factor)
    if block.inner_norms is not None:
        for name, leaf, size in (("dt", "dt_norm", rank), ("b", "B_norm", state), ("c", "C_norm", state)):
            yield entry(f"{blk}.ssm_{name}_norm.weight", (size,), f"{place.name(leaf)}.weight")
    yield from place.linear("ssm_dt", "dt_proj", inner, rank, biased=True)
    yield entry(f"{blk}.ssm_a", (inner, state), place.name("A_log"), "decay")
    yield entry(f"{blk}.ssm_d", (inner,), place.name("D"))
    yield from place.linear("ssm_out", "out_proj", d, inner)


def _mamba2(place: Place, block: Mamba2) -> Iterator[Entry]:
    d, inner, heads, blk, part = block.d_model, block.d_inner, block.n_heads, place.blk, place.part
    factors = [part.before * factor for factor in block.multipliers or (1.0,) * len(PIECES)]
    ends = tuple(accumulate(block.sizes))
    if block.split:
        names = [f"{place.name(f'in_proj.{piece}')}.weight" for piece in PIECES]
        rows = [Rows(name, factor=factor) for name, factor in zip(names, factors, strict=True)]
    elif len(set(factors)) == 1:
        rows = [Rows(f"{place.name('in_proj')}.weight", factor=factors[0])]
    else:
        spans = [range(end - size, end) for end, size in zip(ends, block.sizes, strict=True)]
        name = f"{place.name('in_proj')}.weight"
        rows = [Rows(name, span, factor) for span, factor in zip(spans, factors, strict=True)]
    yield matrix(f"{blk}.ssm_in.weight", (ends[-1], d), *rows)
    yield from place.convolution("ssm_conv1d", "conv1d", sum(block.sizes[1:4]), block.d_conv, block.conv_bias)
    yield entry(f"{blk}.ssm_dt.bias", (heads,), place.name("dt_bias"))
    yield entry(f"{blk}.ssm_a", (heads, 1), place.name("A_log"), "decay")
    yield entry(f"{blk}.ssm_d", (heads, 1), place.name("D"))
    if block.gate != "no_norm":
        groups = block.norm_groups
        yield entry(f"{blk}.ssm_norm.weight", (groups, inner // groups), f"{place.name('norm')}.weight")
    yield from place.linear("ssm_out", "out_proj", d, inner, factor=part.after)


def _attention(place: Place, block: Attention) -> Iterator[Entry]:
    d, head, before, after = block.d_model, block.head_dim, place.part.before, place.part.after
    turned = block.rotary.dims if block.rotary is not None and place.neighbours else 0
    for leaf, name, heads, factor in (
        ("q_proj", "attn_q", block.n_heads, 1.0),
        ("k_proj", "attn_k", block.n_kv_heads, block.key_multiplier),
        ("v_proj", "attn_v", block.n_kv_heads, 1.0),
    ):
        order = in_pairs(heads, head, turned) if turned and leaf != "v_proj" else None
        yield from place.linear(
            name, leaf, heads * head, d, factor=before * factor, biased=block.qkv_bias, after=factor, order=order
        )
    if block.qk_norm is not None:
        for name, leaf in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
            yield entry(f"{place.blk}.{name}.weight", (head,), f"{place.name(leaf)}.weight")
    yield from place.linear(
        "attn_output", "o_proj", d, block.n_heads * head, factor=after, biased=block.o_bias, after=after
    )


def in_pairs(heads: int, head: int, turned: int) -> tuple[int, ...]:
    """The order of rows in which dimensions that are turned together are neighbours: in each head, dimension j of the
    first half of those that are turned, then j of the second half; those that are not turned stay."""
    pairs = [i for j in range(turned // 2) for i in (j, turned // 2 + j)]
    within = (*pairs, *range(turned, head))
    return tuple(h * head + i for h in range(heads) for i in within)


def _feed_forward(place: Place, block: FeedForward) -> Iterator[Entry]:
    d, hidden, biased = block.d_model, block.d_hidden, block.projection_bias
    suffix = "_shexp" if place.shared else ""
    if block.fused:
        for name, first in (("gate", 0), ("up", hidden)):
            order = range(first, first + hidden)
            yield from place.linear(f"ffn_{name}{suffix}", "input_linear", hidden, d, order=order, biased=biased)
    elif block.gated:
        factor = block.gate_multiplier
        yield from place.linear(f"ffn_gate{suffix}", "gate_proj", hidden, d, factor=factor, biased=biased, after=factor)
    if not block.fused:
        yield from place.linear(f"ffn_up{suffix}", "up_proj", hidden, d, biased=biased)
    factor = block.down_multiplier
    leaf = block.hidden.outward
    yield from place.linear(f"ffn_down{suffix}", leaf, d, hidden, factor=factor, biased=biased, after=factor)


def _experts(place: Place, block: Experts) -> Iterator[Entry]:
    d, width, hidden, blk = block.d_model, block.width, block.d_hidden, place.blk
    # float32, as llama.cpp's own converter keeps it
    yield entry(f"{blk}.ffn_gate_inp.weight", (block.experts, d), f"{place.name('router')}.weight")
    if block.routing.corrected:
        yield entry(f"{blk}.exp_probs_b.bias", (block.experts,), place.name("correction_bias"))
    elif block.routing.scores == "sigmoid":  # llama.cpp asks for one wherever it has sigmoids
        yield zeros(f"{blk}.exp_probs_b.bias", block.experts, place.name("router"))
    if block.latent is not None:
        yield from place.linear("ffn_latent_down", "latent_in", width, d, biased=block.latent_bias)
    if block.fused:
        for name, first in (("gate", 0), ("up", hidden)):
            shape = (block.experts, hidden, width)
            rows = _of_experts(place, block, "input_linear", 2 * hidden, range(first, first + hidden))
            yield matrix(f"{blk}.ffn_{name}_exps.weight", shape, *rows)
    else:
        for leaf, _ in block.hidden.inward:
            rows = _of_experts(place, block, leaf, hidden, None)
            shape = (block.experts, hidden, width)
            yield matrix(f"{blk}.ffn_{leaf.removesuffix('_proj')}_exps.weight", shape, *rows)
    rows = _of_experts(place, block, block.hidden.outward, width, None)
    yield matrix(f"{blk}.ffn_down_exps.weight", (block.experts, width, hidden), *rows)
    if block.latent is not None:
        yield from place.linear("ffn_latent_up", "latent_out", d, width, biased=block.latent_bias)


def _of_experts(place: Place, block: Experts, leaf: str, outputs: int, some: range | None) -> list[Rows]:
    """The rows of one kind of projection, expert after expert; some: of each expert's `outputs`, None: all."""
    if not block.together:
        return [Rows(f"{place.name(f'experts.{e}.{leaf}')}.weight", some) for e in range(block.experts)]
    order = None
    if some is not None:
        order = tuple(e * outputs + i for e in range(block.experts) for i in some)
    return [Rows(f"{place.name(f'experts.{leaf}')}.weight", order)]


def _short_conv(place: Place, block: ShortConv) -> Iterator[Entry]:
    d = block.d_model
    yield from place.linear("shortconv.in_proj", "in_proj", 3 * d, d)
    yield entry(f"{place.blk}.shortconv.conv.weight", (d, block.d_conv), f"{place.name('conv')}.weight")
    yield from place.linear("shortconv.out_proj", "out_proj", d, d)
