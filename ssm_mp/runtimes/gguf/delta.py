"""The gated delta rule as llama.cpp holds it.

Its value heads that share a key head are neighbours in ours. For Qwen3.5, llama.cpp wants first the first of every key
head, then the second of every one, and so on; for Qwen3-Next, which has two fused projections, it wants them as ours.

llama.cpp divides queries and keys by their lengths; ours, and transformers, have an epsilon of 1e-6 beside the square
of the length, which is seen where a query is shorter than a tenth or so.

Dimensions: `d` model, `G` key heads, `H` value heads, `n` keys and `m` values of a head, `C` = 2Gn + Hm channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.runtimes.gguf.place import Place
from ssm_mp.runtimes.gguf.tensors import BLOCK, Entry, Rows, entry, matrix


def delta_entries(place: Place, block: DeltaRule) -> Iterator[Entry]:
    """The tensors of a mixer."""
    d, blk, heads = block.d_model, place.blk, block.value_heads
    values = heads * block.value_dim
    order = None if block.fused else by_turns(block, 1)
    yield from _fused(place, block) if block.fused else _apart(place, block)
    channels = None if order is None else _channels(block)
    rows = Rows(f"{place.name('conv1d')}.weight", channels)
    yield Entry(f"{blk}.ssm_conv1d.weight", (block.channels, block.d_conv), (rows,))
    yield Entry(f"{blk}.ssm_dt.bias", (heads,), (Rows(place.name("dt_bias"), order),))
    yield Entry(f"{blk}.ssm_a", (heads,), (Rows(place.name("A_log"), order),), change="decay")
    yield entry(f"{blk}.ssm_norm.weight", (block.value_dim,), f"{place.name('norm')}.weight")
    columns = None if order is None else _blocks_of_columns(block)
    yield matrix(f"{blk}.ssm_out.weight", (d, values), Rows(f"{place.name('out_proj')}.weight", columns=columns))


def _apart(place: Place, block: DeltaRule) -> Iterator[Entry]:
    """Four projections (Qwen3.5)."""
    d, heads, width = block.d_model, block.value_heads, block.value_dim
    yield from place.linear("attn_qkv", "in_proj_qkv", block.channels, d, order=_channels(block))
    yield from place.linear("attn_gate", "in_proj_z", heads * width, d, order=by_turns(block, width))
    yield from place.linear("ssm_beta", "in_proj_b", heads, d, order=by_turns(block, 1))
    yield from place.linear("ssm_alpha", "in_proj_a", heads, d, order=by_turns(block, 1))


def _fused(place: Place, block: DeltaRule) -> Iterator[Entry]:
    """Two projections, rows by key head: its query, its key, its values, their gates (Qwen3-Next)."""
    d, groups, n = block.d_model, block.key_heads, block.key_dim
    values = block.value_heads // groups * block.value_dim
    size = 2 * n + 2 * values
    spans = ((0, n), (n, n), (2 * n, values), (2 * n + values, values))
    q, k, v, z = ([g * size + first + i for g in range(groups) for i in range(length)] for first, length in spans)
    yield from place.linear("attn_qkv", "in_proj_qkvz", block.channels, d, order=(*q, *k, *v))
    yield from place.linear("attn_gate", "in_proj_qkvz", groups * values, d, order=tuple(z))
    yield from place.linear("ssm_ba", "in_proj_ba", 2 * block.value_heads, d)


def by_turns(block: DeltaRule, width: int) -> tuple[int, ...]:
    """Rows of value heads of `width` each in the order of llama.cpp."""
    groups, ratio = block.key_heads, block.value_heads // block.key_heads
    heads = (g * ratio + j for j in range(ratio) for g in range(groups))
    return tuple(chain.from_iterable(range(head * width, (head + 1) * width) for head in heads))


def _channels(block: DeltaRule) -> tuple[int, ...]:
    """Queries and keys as they are, then the values."""
    before = 2 * block.key_heads * block.key_dim
    return (*range(before), *(before + i for i in by_turns(block, block.value_dim)))


def _blocks_of_columns(block: DeltaRule) -> tuple[int, ...] | None:
    """Blocks of out_proj's columns in the order of its inputs; None where they stay."""
    if block.value_heads == block.key_heads:
        return None
    return by_turns(block, block.value_dim // BLOCK)
