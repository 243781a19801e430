"""The gated delta rule mixer (Yang, Kautz & Hatamizadeh 2025; transformers' Qwen3NextGatedDeltaNet and
Qwen3_5GatedDeltaNet).

Dimensions: `b` batch, `l` length, `d` model, `G` key heads, `H` value heads, `n` keys and `m` values of a head,
`K` convolution kernel, `C` = 2Gn + Hm convolved channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.kernels import delta_rule as kernels
from ssm_mp.kernels.calls import MOST_KEYS
from ssm_mp.kernels.delta import delta_rule, delta_rule_chunked
from ssm_mp.kernels.gates import GatedNorm
from ssm_mp.modules.norm import Norm, NormForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.programs.program import Carried, Into, NotCompiledError, Program, Value


@dataclass(frozen=True, kw_only=True)
class DeltaRule(Block):
    """Convolved queries, keys and values; the gated delta rule; gated norm of each head, projection.

    key_dim, value_dim: of one head. value_heads: a multiple of key_heads; those of a key head follow each other.
    fused: two projections, rows by key head (Qwen3-Next), in place of four (Qwen3.5).
    """

    word = "delta_rule"
    differentiable = staticmethod(delta_rule_chunked)

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    d_conv: int
    norm_eps: float
    fused: bool = False

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        values, heads = self.value_heads * self.value_dim, self.value_heads
        sizes = {"in_proj_qkv": self.channels, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        if self.fused:
            sizes = {"in_proj_qkvz": self.channels + values, "in_proj_ba": 2 * heads}
        for leaf, size in sizes.items():
            yield from self.linear(at, layer, leaf, size, self.d_model)
        yield from self.convolution(at, layer, "conv1d", self.channels, self.d_conv, with_bias=False)
        yield self.value(at, layer, "dt_bias", heads)
        yield self.value(at, layer, "A_log", heads)
        yield from self.norm(at, layer, "norm", self.value_dim, NormForm(self.norm_eps))
        yield from self.linear(at, layer, "out_proj", self.d_model, values)

    def module(self, parts: Parts, scan: Scan | None = None) -> DeltaRuleMixing:
        return DeltaRuleMixing(self, parts, scan or delta_rule)

    @property
    def entrances(self) -> tuple[str, ...]:
        if self.fused:
            return ("in_proj_qkvz", "in_proj_ba")
        return ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def foldings(self, at: str) -> Iterator[Folding]:
        # the heads share one norm
        outward = (f"{self.component(at, 'out_proj')}.weight",)
        yield Folding(self.rows(at, "norm"), outward, self.value_dim, times=self.value_heads)

    @property
    def token_floats(self) -> int:
        values = self.value_heads * self.value_dim
        # in chunks: keys and queries once for each value head, a few times over, and products of a chunk's tokens
        scanned = self.value_heads * (8 * self.key_dim + 6 * self.value_dim + 5 * 64)
        return 2 * self.d_model + 3 * self.channels + 6 * values + scanned

    @property
    def channels(self) -> int:
        """Channels that are convolved: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class DeltaRuleMixing(Mixing):
    """The module of `DeltaRule`. Its state: the convolution's last inputs `[b, K−1, C]`, the rule's `[b, H, n, m]`."""

    def __init__(self, block: DeltaRule, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.sizes = (block.key_heads, block.value_heads, block.key_dim, block.value_dim)
        self.scan = scan
        names = (
            ("in_proj_qkvz", "in_proj_ba") if block.fused else ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        )
        self.in_projs = nn.ModuleList(parts[name] for name in names)
        self.conv1d = parts["conv1d"]
        self.dt_bias = parts.value("dt_bias")
        self.A_log = parts.value("A_log")
        self.norm = parts["norm"]
        self.out_proj = parts["out_proj"]
        self._rate = Unpacked(lambda tensor: -torch.exp(tensor))  # [H]
        self._offset = Unpacked()  # [H]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        groups, heads, n, m = self.sizes
        qkv, z, b, a = self._projected(u)
        qkv, inputs = self.conv1d(qkv, None if before is None else before[0])
        q, k, v = qkv.split((groups * n, groups * n, heads * m), dim=-1)
        q, k, v = q.unflatten(-1, (groups, n)), k.unflatten(-1, (groups, n)), v.unflatten(-1, (heads, m))
        g = self._rate(self.A_log) * F.softplus(a + self._offset(self.dt_bias))  # [b, l, H]
        y, last = self.scan(q, k, v, g, torch.sigmoid(b), None if before is None else before[1])
        gated = self.norm(y).flatten(2) * F.silu(z)
        return self.out_proj(gated), (inputs, last)

    def _projected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values `[b, l, C]`, the gate `[b, l, Hm]`, what β and the decay come from `[b, l, H]`."""
        projected = [projection(u) for projection in self.in_projs]
        if len(projected) == 4:
            qkv, z, b, a = projected
            return qkv, z, b, a
        groups, heads, n, m = self.sizes
        ratio = heads // groups
        qkvz, ba = (x.unflatten(-1, (groups, -1)) for x in projected)
        *qkv_parts, z = qkvz.split((n, n, ratio * m, ratio * m), dim=-1)
        b, a = ba.split((ratio, ratio), dim=-1)
        return torch.cat([part.flatten(2) for part in qkv_parts], dim=-1), z.flatten(2), b.flatten(2), a.flatten(2)

    def emit(self, program: Program, u: Value, into: Into) -> None:
        groups, heads, n, m = self.sizes
        if self.scan is not delta_rule:
            raise NotCompiledError("another scan is asked for")
        if n > MOST_KEYS:
            raise NotCompiledError(f"heads of {n} keys, and the kernel takes up to {MOST_KEYS}")
        qkv, z, b, a = self._emit_projected(program, u)
        q, k, v = program.convolution(self.conv1d, qkv).split((groups * n, groups * n, heads * m))
        y = program.new(heads * m)
        what = kernels.DeltaRule(
            *(value.structure for value in (q, k, v, b, a, y)), groups, heads, n, m,
            program.floats(self._rate(self.A_log)), program.floats(self._offset(self.dt_bias)),
            program.state(Carried(lambda batch, capacity: (batch, heads, n, m))),
        )  # fmt: skip
        program.call("delta_rule", what)
        assert isinstance(self.norm, Norm)
        factors = program.floats(self.norm.factors().repeat(heads))  # the heads share them
        gated = GatedNorm(y.structure, z.structure, y.width, heads, True, factors, self.norm.eps)
        program.call("gated_norm", gated, self.norm)
        program.product(self.out_proj, y, into)

    def _emit_projected(self, program: Program, u: Value) -> tuple[Value, ...]:
        projected = [program.product(projection, u) for projection in self.in_projs]
        if len(projected) == 4:
            return tuple(projected)
        groups, heads, n, m = self.sizes
        values, ratio = heads * m, heads // groups
        qkvz = self._emit_regrouped(program, projected[0], (n, n, ratio * m, ratio * m))
        ba = self._emit_regrouped(program, projected[1], (ratio, ratio))
        channels = qkvz.width - values
        return qkvz.part(0, channels), qkvz.part(channels, values), ba.part(0, heads), ba.part(heads, heads)

    def _emit_regrouped(self, program: Program, x: Value, widths: tuple[int, ...]) -> Value:
        """Rows by key head, of so many columns of each kind → by kind, its columns of all key heads side by side."""
        groups = self.sizes[0]
        y, stride = program.new(x.width), x.width // groups
        pieces = y.split([groups * width for width in widths])
        for first, piece in zip(x.part(0, stride).split(widths), pieces, strict=True):
            what = kernels.Regrouped(first.structure, piece.structure, groups, stride, first.width)
            program.call("regrouped", what)
        return y
