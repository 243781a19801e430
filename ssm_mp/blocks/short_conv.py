"""The gated short convolution of LFM2 (transformers' Lfm2ShortConv).

Dimensions: `b` batch, `l` length, `d` model, `K` convolution kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.kernels import short_conv as kernels
from ssm_mp.modules.parameter import Parameter
from ssm_mp.programs.program import Into, Program, Value


@dataclass(frozen=True, kw_only=True)
class ShortConv(Block):
    """A gate, a convolution without activation, another gate, projection.

    with_bias: of both projections and of the convolution.
    """

    word = "short_conv"

    d_conv: int
    with_bias: bool = False

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d = self.d_model
        yield from self.linear(at, layer, "in_proj", 3 * d, d, with_bias=self.with_bias)
        yield from self.convolution(at, layer, "conv", d, self.d_conv, with_bias=self.with_bias, activation=False)
        yield from self.linear(at, layer, "out_proj", d, d, with_bias=self.with_bias)

    def module(self, parts: Parts, scan: Scan | None = None) -> ShortConvMixing:
        return ShortConvMixing(parts)

    @property
    def entrances(self) -> tuple[str, ...]:
        return ("in_proj",)

    def foldings(self, at: str) -> Iterator[Folding]:
        convolution = self.rows(at, "conv", with_bias=self.with_bias)
        yield Folding(convolution, (f"{self.component(at, 'out_proj')}.weight",), self.d_model)

    @property
    def token_floats(self) -> int:
        return 10 * self.d_model


class ShortConvMixing(Mixing):
    """The module of `ShortConv`. Its state: the convolution's last inputs `[b, K−1, d]`."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.in_proj = parts["in_proj"]
        self.conv = parts["conv"]
        self.out_proj = parts["out_proj"]

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        B, C, x = self.in_proj(u).chunk(3, dim=-1)  # [b, l, d] each  # noqa: N806
        mixed, inputs = self.conv(B * x, None if before is None else before[0])
        return self.out_proj(C * mixed), (inputs,)

    def emit(self, program: Program, u: Value, into: Into) -> None:
        entered = program.product(self.in_proj, u)
        d = entered.width // 3
        B, C, x = (entered.part(i * d, d) for i in range(3))  # noqa: N806
        program.call("times", kernels.Times(B.structure, x.structure, x.structure, d))
        mixed = program.convolution(self.conv, x)
        program.call("times", kernels.Times(C.structure, mixed.structure, mixed.structure, d))
        program.product(self.out_proj, mixed, into)
