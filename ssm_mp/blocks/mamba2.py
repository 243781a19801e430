"""The Mamba-2 mixer (Dao & Gu 2024, section 7; transformers' Mamba2Mixer, BambaMixer, GraniteMoeHybridMambaLayer,
FalconH1Mixer and NemotronHMamba2Mixer).

Dimensions: `b` batch, `l` length, `d` model, `I` inner (H·P), `H` heads, `P` channels of a head, `N` state, `G` groups
of heads with the same B and C, `K` convolution kernel, `W` channels of the convolution (I + 2·G·N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.kernels.gated_norm import gated_norm
from ssm_mp.kernels.gates import GatedNorm
from ssm_mp.kernels.mamba2 import Mamba2Scan
from ssm_mp.kernels.ssd import CHUNK, Limits, ssd_scan, ssd_scan_chunked
from ssm_mp.modules.norm import Norm, NormForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.programs.program import Carried, Into, NotCompiledError, Program, Value

PIECES = ("z", "x", "B", "C", "dt")
"""What in_proj gives, in the order of its rows."""

_NORM = NormForm(1e-5)


@dataclass(frozen=True, kw_only=True)
class Mamba2(Block):
    """Projection, convolution, scan with one step and one decay a head, gated norm, projection.

    out_bias: out_proj has a bias (Falcon-H1 says so apart from in_proj's).
    dt_limits: the least and the greatest step; None: no greatest one. They hold for every token; transformers forgets
    them where it decodes one token after another.
    gate: whether the gate comes before the norm or after it, or there is no norm.
    norm_form, norm_groups: the norm, over each of so many groups of neighbouring channels by itself.
    multipliers: of what in_proj gives: z, x, B, C and dt (Falcon-H1).
    split: in_proj is held as five components, `in_proj.z` to `in_proj.dt`; what is computed is the same.
    """

    word = "mamba2"
    differentiable = staticmethod(ssd_scan_chunked)

    d_inner: int
    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    d_conv: int
    projection_bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    dt_limits: Limits = (0.0, None)
    gate: Literal["gate_first", "norm_first", "no_norm"] = "gate_first"
    norm_form: NormForm = _NORM
    norm_groups: int = 1
    multipliers: tuple[float, float, float, float, float] | None = None
    split: bool = False

    def __post_init__(self) -> None:
        if self.d_inner != self.n_heads * self.head_dim:
            raise ValueError(f"d_inner {self.d_inner} is not n_heads {self.n_heads} · head_dim {self.head_dim}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_groups {self.n_groups}")
        if self.gate != "no_norm" and self.d_inner % self.norm_groups:
            raise ValueError(f"d_inner {self.d_inner} is no multiple of norm_groups {self.norm_groups}")

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Rows of z, x, B, C and dt in in_proj."""
        states = self.n_groups * self.d_state
        return (self.d_inner, self.d_inner, states, states, self.n_heads)

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, inner, heads, biased = self.d_model, self.d_inner, self.n_heads, self.projection_bias
        if self.split:
            word = self.component(at, "in_proj").rsplit(".", 1)[-1]
            for piece, size in zip(PIECES, self.sizes, strict=True):
                yield from self.linear(at, layer, f"in_proj.{piece}", size, d, with_bias=biased, kind=f"{word}_{piece}")
        else:
            yield from self.linear(at, layer, "in_proj", sum(self.sizes), d, with_bias=biased)
        yield from self.convolution(at, layer, "conv1d", sum(self.sizes[1:4]), self.d_conv, with_bias=self.conv_bias)
        for leaf in ("dt_bias", "A_log", "D"):
            yield self.value(at, layer, leaf, heads)
        if self.gate != "no_norm":
            yield from self.norm(at, layer, "norm", inner, self.norm_form)
        yield from self.linear(at, layer, "out_proj", d, inner, with_bias=self.out_bias)

    def module(self, parts: Parts, scan: Scan | None = None) -> Mamba2Mixing:
        return Mamba2Mixing(self, parts, scan or ssd_scan)

    @property
    def entrances(self) -> tuple[str, ...]:
        return tuple(f"in_proj.{piece}" for piece in PIECES) if self.split else ("in_proj",)

    def foldings(self, at: str) -> Iterator[Folding]:
        if self.gate != "no_norm":
            yield Folding(self.rows(at, "norm"), (f"{self.component(at, 'out_proj')}.weight",), self.d_inner)

    @property
    def unfoldable(self) -> tuple[str, ...]:
        return ("out_proj",) if self.gate == "no_norm" else ()

    @property
    def token_floats(self) -> int:
        # a chunk's scores are held several times over where the scan is made of torch's operators
        return 4 * self.d_model + 3 * sum(self.sizes) + 4 * self.d_inner + 4 * CHUNK * self.n_heads


class Mamba2Mixing(Mixing):
    """The module of `Mamba2`. Its state: the convolution's last inputs `[b, K−1, W]`, and the scan's `[b, H, P, N]`."""

    def __init__(self, block: Mamba2, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.block = block
        self.scan = scan
        self.in_projs = (
            nn.ModuleList(parts[f"in_proj.{piece}"] for piece in PIECES)
            if block.split
            else nn.ModuleList([parts["in_proj"]])
        )
        self.conv1d = parts["conv1d"]
        self.dt_bias = parts.value("dt_bias")
        self.A_log = parts.value("A_log")
        self.D = parts.value("D")
        self.norm = None if block.gate == "no_norm" else parts["norm"]
        self.out_proj = parts["out_proj"]
        self._A = Unpacked(lambda tensor: -torch.exp(tensor))  # [H]
        self._skip, self._dt_bias = Unpacked(), Unpacked()  # [H] each

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        block = self.block
        inputs, state = (None, None) if before is None else before
        z, xBC, dt = self.projected(u)  # [b, l, I], [b, l, W], [b, l, H]  # noqa: N806
        xBC, last_inputs = self.conv1d(xBC, inputs)  # noqa: N806
        x, B, C = xBC.split(block.sizes[1:4], dim=-1)  # noqa: N806
        y, last = self.scan(
            x.unflatten(-1, (block.n_heads, -1)), dt, self._A(self.A_log),
            B.unflatten(-1, (block.n_groups, -1)), C.unflatten(-1, (block.n_groups, -1)),
            self._skip(self.D), self._dt_bias(self.dt_bias), block.dt_limits, state,
        )  # fmt: skip
        return self.out_proj(self._gated(y.flatten(-2), z)), (last_inputs, last)

    def projected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, what goes into the convolution, and dt before its bias."""
        block = self.block
        found = [proj(u) for proj in self.in_projs]
        sizes = block.sizes
        if block.multipliers is None and not block.split:
            z, xBC, dt = found[0].split((sizes[0], sum(sizes[1:4]), sizes[4]), dim=-1)  # noqa: N806
            return z, xBC, dt
        pieces = found if block.split else found[0].split(sizes, dim=-1)
        if block.multipliers is not None:
            pieces = [piece * factor for piece, factor in zip(pieces, block.multipliers, strict=True)]
        return pieces[0], torch.cat(pieces[1:4], dim=-1), pieces[4]

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """`y [b, l, I]`, normalised and gated by `z [b, l, I]`."""
        if self.block.gate == "no_norm":
            return gated_norm(y, z, None)
        norm = self.norm
        assert isinstance(norm, Norm)
        return gated_norm(y, z, norm.factors(), self.block.norm_groups, norm.eps, self.block.gate)

    def emit(self, program: Program, u: Value, into: Into) -> None:
        block = self.block
        if self.scan is not ssd_scan:
            raise NotCompiledError("another scan is asked for")
        z, xBC, dt = self._emit_projected(program, u)  # noqa: N806
        xBC = program.convolution(self.conv1d, xBC)  # noqa: N806
        x, B, C = xBC.split(block.sizes[1:4])  # noqa: N806
        y = program.new(block.d_inner)
        heads, width, n = block.n_heads, block.head_dim, block.d_state
        state = Carried(lambda batch, capacity: (batch, heads, n, width), lambda held, tokens: held.transpose(2, 3))
        low, high = block.dt_limits
        A2 = self._A(self.A_log) * math.log2(math.e)  # [H]  # noqa: N806
        what = Mamba2Scan(
            *(value.structure for value in (x, B, C, dt, y)), heads, width, n, block.n_groups, program.floats(A2),
            program.floats(self._skip(self.D)), program.floats(self._dt_bias(self.dt_bias)),
            low, math.inf if high is None else high, program.state(state),
        )  # fmt: skip
        program.call("mamba2_scan", what)
        self._emit_gated(program, y, z)
        program.product(self.out_proj, y, into)

    def _emit_projected(self, program: Program, u: Value) -> tuple[Value, Value, Value]:
        block, sizes = self.block, self.block.sizes
        if block.split:
            found = program.new(sum(sizes))
            pieces = found.split(sizes)
            for proj, piece in zip(self.in_projs, pieces, strict=True):
                program.product(proj, u, Into(piece))
        else:
            found = program.product(self.in_projs[0], u)
            pieces = found.split(sizes)
        for piece, factor in zip(pieces, block.multipliers or (), strict=False):  # of none or of each
            if factor != 1.0:
                program.scaled(piece, factor, Into(piece))
        return pieces[0], found.part(sizes[0], sum(sizes[1:4])), pieces[4]

    def _emit_gated(self, program: Program, y: Value, z: Value) -> None:
        gated = GatedNorm(y.structure, z.structure, y.width, 1, 0, None, 0.0)
        if self.block.gate != "no_norm":
            assert isinstance(self.norm, Norm)
            gated.groups, gated.norm_first = self.block.norm_groups, self.block.gate == "norm_first"
            gated.weight, gated.eps = program.floats(self.norm.factors()), self.norm.eps
        program.call("gated_norm", gated, self.norm)
