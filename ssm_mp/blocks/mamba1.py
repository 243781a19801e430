"""The Mamba-1 mixer (Gu & Dao 2023, section 3.4; transformers' MambaMixer.slow_forward and FalconMambaMixer's).

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank, `K` convolution kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.kernels import program as kernels
from ssm_mp.kernels.scan import selective_scan, selective_scan_reference
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.programs.program import Carried, Into, NotCompiledError, Program, Value


@dataclass(frozen=True, kw_only=True)
class Mamba1(Block):
    """Gated convolution, selective scan, projection.

    inner_norms: a norm of the step, B and C before they are used (Jamba); weightless_eps: the same without weights
    (Falcon-Mamba).
    """

    word = "mamba1"
    differentiable = staticmethod(selective_scan_reference)

    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    projection_bias: bool = False
    conv_bias: bool = True
    inner_norms: NormForm | None = None
    weightless_eps: float | None = None

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, inner = self.d_model, self.d_inner
        yield from self.linear(at, layer, "in_proj", 2 * inner, d, with_bias=self.projection_bias)
        yield from self.convolution(at, layer, "conv1d", inner, self.d_conv, with_bias=self.conv_bias)
        yield from self.linear(at, layer, "x_proj", self.dt_rank + 2 * self.d_state, inner)
        if self.inner_norms is not None:
            for leaf, size in (("dt_norm", self.dt_rank), ("B_norm", self.d_state), ("C_norm", self.d_state)):
                yield from self.norm(at, layer, leaf, size, self.inner_norms)
        yield from self.linear(at, layer, "dt_proj", inner, self.dt_rank, with_bias=True)
        yield self.value(at, layer, "A_log", inner, self.d_state)
        yield self.value(at, layer, "D", inner)
        yield from self.linear(at, layer, "out_proj", d, inner, with_bias=self.projection_bias)

    @property
    def has_inner_norms(self) -> bool:
        """Whether step, B and C are normalised."""
        return self.inner_norms is not None or self.weightless_eps is not None

    def module(self, parts: Parts, scan: Scan | None = None) -> Mamba1Mixing:
        return Mamba1Mixing(self, parts, scan or selective_scan)

    @property
    def entrances(self) -> tuple[str, ...]:
        return ("in_proj",)

    @property
    def unfoldable(self) -> tuple[str, ...]:
        # channels pass two activations and share B and C
        return ("out_proj",)

    @property
    def token_floats(self) -> int:
        return 4 * self.d_model + 14 * self.d_inner + self.dt_rank + 6 * self.d_state


class Mamba1Mixing(Mixing):
    """The module of `Mamba1`. Its state: the convolution's last inputs `[b, K−1, I]`, and the scan's `[b, I, N]`."""

    def __init__(self, block: Mamba1, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.sizes = (block.dt_rank, block.d_state, block.d_state)
        self.scan = scan
        self.in_proj = parts["in_proj"]
        self.conv1d = parts["conv1d"]
        self.x_proj = parts["x_proj"]
        self.dt_proj = parts["dt_proj"]
        self.A_log = parts.value("A_log")
        self.D = parts.value("D")
        self.out_proj = parts["out_proj"]
        weighted = block.inner_norms is not None
        self.inner_norms = nn.ModuleList(parts[n] for n in ("dt_norm", "B_norm", "C_norm")) if weighted else None
        self.weightless_eps = block.weightless_eps
        self._A = Unpacked(lambda tensor: -torch.exp(tensor).t().contiguous().t())  # [I, N]
        self._skip = Unpacked()  # [I]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        a, z = self.in_proj(u).chunk(2, dim=-1)  # [b, l, I] each
        a, inputs = self.conv1d(a, None if before is None else before[0])
        dt, B, C = self._normed(*self.x_proj(a).split(self.sizes, dim=-1))  # [b, l, R], [b, l, N] twice  # noqa: N806
        state = None if before is None else before[1]
        y, last = self.scan(a, self.dt_proj(dt), self._A(self.A_log), B, C, self._skip(self.D), z, state)
        return self.out_proj(y), (inputs, last)

    def _normed(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Step, B and C as they are used."""
        if self.inner_norms is not None:
            return tuple(norm(value) for norm, value in zip(self.inner_norms, values, strict=True))
        if self.weightless_eps is not None:
            return tuple(F.rms_norm(value, value.shape[-1:], eps=self.weightless_eps) for value in values)
        return values

    def emit(self, program: Program, u: Value, into: Into) -> None:
        if self.scan is not selective_scan:
            raise NotCompiledError("another scan is asked for")
        xz = program.product(self.in_proj, u)
        inner = xz.width // 2
        a = program.convolution(self.conv1d, xz.part(0, inner))
        p = program.product(self.x_proj, a)
        rank, n, _ = self.sizes
        dt, B, C = p.part(0, rank), p.part(rank, n), p.part(rank + n, n)  # noqa: N806
        for i, value in enumerate((dt, B, C)):
            if self.inner_norms is not None:
                program.norm(self.inner_norms[i], value, value)
            elif self.weightless_eps is not None:
                program.weightless_norm(value, self.weightless_eps, value)
        step = program.product(self.dt_proj, dt)
        A2 = self._A(self.A_log) * math.log2(math.e)  # [I, N]  # noqa: N806
        state = program.state(Carried(lambda batch, capacity: (batch, inner, n)))
        what = kernels.SelectiveScan(
            *(value.structure for value in (a, step, B, C, xz.part(inner, inner), a)), inner, n,
            program.floats(A2), program.floats(A2.t()), program.floats(self._skip(self.D)), state,
        )  # fmt: skip
        program.call("selective_scan", what)
        program.product(self.out_proj, a, into)
