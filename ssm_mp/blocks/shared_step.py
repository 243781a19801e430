"""The mixer of family `itera` (design, section 4): one step size a token, a state of N shared by all channels.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `K` convolution kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding, Rows
from ssm_mp.kernels import shared_step as kernels
from ssm_mp.kernels.scan import shared_step_scan, shared_step_scan_reference
from ssm_mp.modules.parameter import Parameter
from ssm_mp.programs.program import Carried, Into, NotCompiledError, Program, Value


@dataclass(frozen=True, kw_only=True)
class SharedStep(Block):
    """Gated convolution, state-space core with constant B and C, projection."""

    word = "shared_step"
    differentiable = staticmethod(shared_step_scan_reference)

    d_inner: int
    d_state: int
    d_conv: int

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, inner, n = self.d_model, self.d_inner, self.d_state
        yield from self.linear(at, layer, "in_proj", 2 * inner, d)
        yield from self.convolution(at, layer, "conv1d", inner, self.d_conv, with_bias=True)
        yield from self.linear(at, layer, "delta_proj", inner, inner, with_bias=True)
        yield self.value(at, layer, "A_log", n)
        yield self.value(at, layer, "B", n, inner)
        yield self.value(at, layer, "C", inner, n)
        yield self.value(at, layer, "D", inner)
        yield from self.linear(at, layer, "out_proj", d, inner)

    def module(self, parts: Parts, scan: Scan | None = None) -> SharedStepMixing:
        return SharedStepMixing(parts, scan or shared_step_scan)

    @property
    def entrances(self) -> tuple[str, ...]:
        return ("in_proj",)

    def foldings(self, at: str) -> Iterator[Folding]:
        states = (Rows(self.component(at, "C")), Rows(self.component(at, "D")))
        yield Folding(states, (f"{self.component(at, 'out_proj')}.weight",), self.d_inner)

    @property
    def token_floats(self) -> int:
        return 4 * self.d_model + 14 * self.d_inner + 6 * self.d_state


class SharedStepMixing(Mixing):
    """The module of `SharedStep`. Its state: the convolution's last inputs `[b, K−1, I]`, and the scan's `[b, N]`."""

    def __init__(self, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        self.in_proj = parts["in_proj"]
        self.conv1d = parts["conv1d"]
        self.delta_proj = parts["delta_proj"]
        self.A_log = parts.value("A_log")
        self.B = parts.value("B")
        self.C = parts.value("C")
        self.D = parts.value("D")
        self.out_proj = parts["out_proj"]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        a, z = self.in_proj(u).chunk(2, dim=-1)  # [b, l, I] each
        a, inputs = self.conv1d(a, None if before is None else before[0])
        A = -torch.exp(self.A_log.tensor())  # [N]  # noqa: N806
        B, C, D = self.B.tensor(), self.C.tensor(), self.D.tensor()  # noqa: N806
        y, last = self.scan(a, self.delta_proj(a), A, B, C, D, z, None if before is None else before[1])
        return self.out_proj(y), (inputs, last)

    def emit(self, program: Program, u: Value, into: Into) -> None:
        if self.scan is not shared_step_scan:
            raise NotCompiledError("another scan is asked for")
        az = program.product(self.in_proj, u)
        inner = az.width // 2
        a = program.convolution(self.conv1d, az.part(0, inner))
        dt = program.product(self.delta_proj, a)
        states = program.product(self.B, a)
        n, A2 = states.width, -torch.exp(self.A_log.tensor()) * math.log2(math.e)  # [N]  # noqa: N806
        state = program.state(Carried(lambda batch, capacity: (batch, n)))
        program.call(
            "shared_step", kernels.SharedStep(dt.structure, states.structure, inner, n, program.floats(A2), state)
        )
        y = program.product(self.C, states)
        z, D = az.part(inner, inner), program.floats(self.D.tensor())  # noqa: N806
        program.call("shared_step_outputs", kernels.SharedStepOutputs(y.structure, a.structure, z.structure, inner, D))
        program.product(self.out_proj, y, into)
