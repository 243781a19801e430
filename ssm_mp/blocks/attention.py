"""Causal attention with grouped keys and values.

Dimensions: `b` batch, `l` length, `d` model, `h` query heads, `g` key and value heads, `e` head, `t` tokens so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.blocks.rotary import Rotary, turned
from ssm_mp.kernels import attention as kernels
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.programs.program import Carried, Into, NotCompiledError, Program, Value


@dataclass(frozen=True, kw_only=True)
class Attention(Block):
    """Each token looks at itself and at all before it.

    n_kv_heads: how many heads keys and values have; n_heads is a multiple of it.
    qkv_bias, o_bias: which projections have a bias.
    scale: of the scores, by default head_dim^-½.
    rotary: None where positions are not told (Granite, Nemotron-H, Jamba).
    qk_norm: of each query's and each key's head, before it is turned (LFM2, Qwen3-Next).
    output_gate: q_proj holds, head after head, a query and the sigmoid gate of what the head found (Qwen3-Next).
    key_multiplier: of the keys (Falcon-H1).
    """

    word = "attention"

    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    scale: float | None = None
    rotary: Rotary | None = None
    qk_norm: NormForm | None = None
    output_gate: bool = False
    key_multiplier: float = 1.0

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, inner = self.d_model, self.n_heads * self.head_dim
        queries, keys = inner * (2 if self.output_gate else 1), self.n_kv_heads * self.head_dim
        for leaf, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from self.linear(at, layer, leaf, outputs, d, with_bias=self.qkv_bias)
        if self.qk_norm is not None:
            yield from self.norm(at, layer, "q_norm", self.head_dim, self.qk_norm)
            yield from self.norm(at, layer, "k_norm", self.head_dim, self.qk_norm)
        yield from self.linear(at, layer, "o_proj", d, inner, with_bias=self.o_bias)

    def module(self, parts: Parts, scan: Scan | None = None) -> AttentionMixing:
        return AttentionMixing(self, parts, scan or attention)

    @property
    def entrances(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj")

    def foldings(self, at: str) -> Iterator[Folding]:
        values = self.rows(at, "v_proj", with_bias=self.qkv_bias)
        outward = (f"{self.component(at, 'o_proj')}.weight",)
        shared = self.n_heads // self.n_kv_heads
        yield Folding(values, outward, self.n_kv_heads * self.head_dim, self.n_kv_heads, shared)

    @property
    def token_floats(self) -> int:
        return 4 * self.d_model + (8 * self.n_heads + 8 * self.n_kv_heads) * self.head_dim


class AttentionMixing(Mixing):
    """The module of `Attention`. Its state: the keys, turned already, and the values so far, `[b, g, t, e]` each; a
    token's position is how many there are before it."""

    def __init__(self, block: Attention, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.block = block
        self.scan = scan
        self.scale = block.head_dim**-0.5 if block.scale is None else block.scale
        self.q_proj = parts["q_proj"]
        self.k_proj = parts["k_proj"]
        self.v_proj = parts["v_proj"]
        self.q_norm = None if block.qk_norm is None else parts["q_norm"]
        self.k_norm = None if block.qk_norm is None else parts["k_norm"]
        self.o_proj = parts["o_proj"]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        block, gate = self.block, None
        q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)
        q = q.unflatten(-1, (block.n_heads, -1))  # [b, l, h, e], or 2e
        if block.output_gate:
            q, gate = q.chunk(2, dim=-1)
        k, v = (x.unflatten(-1, (block.n_kv_heads, block.head_dim)) for x in (k, v))
        if block.key_multiplier != 1.0:
            k = k * block.key_multiplier
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, h or g, l, e]
        if block.rotary is not None:
            waves = block.rotary.waves(0 if before is None else before[0].shape[2], u.shape[1], u.device)
            q, k = turned(q, *waves), turned(k, *waves)
        if before is not None:
            k, v = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
        y = self.scan(q, k, v, self.scale).transpose(1, 2)  # [b, l, h, e]
        if gate is not None:
            y = y * gate.sigmoid()
        return self.o_proj(y.flatten(2)), (k, v)

    def emit(self, program: Program, u: Value, into: Into) -> None:
        if self.scan is not attention:
            raise NotCompiledError("another scan is asked for")
        block = self.block
        q, k, v = program.product(self.q_proj, u), program.product(self.k_proj, u), program.product(self.v_proj, u)
        if block.key_multiplier != 1.0:
            program.scaled(k, block.key_multiplier, Into(k))
        if self.q_norm is not None and self.k_norm is not None:
            apart = q.width // block.n_heads
            for h in range(block.n_heads) if block.output_gate else ():
                query = q.part(h * apart, block.head_dim)
                program.norm(self.q_norm, query, query)
            if not block.output_gate:
                program.norm(self.q_norm, q, q, block.n_heads)
            program.norm(self.k_norm, k, k, block.n_kv_heads)
        y = program.new(block.n_heads * block.head_dim)
        program.call("attention", self._structure(program, q, k, v, y))
        program.product(self.o_proj, y, into)

    def _structure(self, program: Program, q: Value, k: Value, v: Value, y: Value) -> kernels.Attention:
        """What the kernel attends with, its states the next ones."""
        block, frequencies, louder = self.block, torch.empty(0), 1.0
        if block.rotary is not None:
            frequencies, louder = block.rotary.frequencies(torch.device("cpu"))
        groups, width = block.n_kv_heads, block.head_dim
        keys, values = (
            program.state(
                Carried(
                    lambda batch, capacity: (batch, groups, capacity, width),
                    lambda held, tokens: held[:, :, :tokens],
                    grows=True,
                )
            )
            for _ in range(2)
        )
        return kernels.Attention(
            *(value.structure for value in (q, k, v, y)), block.n_heads, groups, width, frequencies.numel(),
            block.output_gate, program.floats(frequencies), louder, self.scale, keys, values,
        )  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens, `q [b, h, l, e]`, over all, `k` and `v [b, g, t, e]`, t ≥ l: `[b, h, l, e]`.

    One fused call that holds neither scores nor copies of keys and values for every query head (measured on a CPU).
    """
    length, seen = q.shape[2], k.shape[2]
    if length == 1:  # the queries that share keys are rows of one product: half the time of a call that repeats keys
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [b, g, h / g, e]
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    grouped = q.shape[1] != k.shape[1]
    if length == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = visible(length, seen, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention` with the scores written out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * scale  # [b, h, l, t]
    hidden = ~visible(q.shape[2], k.shape[2], q.device)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v


def visible(length: int, seen: int, device: torch.device) -> Tensor:
    """Which of all `seen` tokens each of the last `length` ones looks at: bool `[l, t]`."""
    return torch.ones(length, seen, dtype=torch.bool, device=device).tril(diagonal=seen - length)
