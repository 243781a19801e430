"""Feed-forwards.

Dimensions: `d` model, `E` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.blocks.hidden import Activation, Hidden
from ssm_mp.kernels import feed_forward as kernels
from ssm_mp.modules.parameter import Parameter
from ssm_mp.programs.program import Into, Program, Value


@dataclass(frozen=True, kw_only=True)
class FeedForward(Block):
    """`down_proj(activation(up_proj(u)))`.

    gated: `down_proj(activation(gate_proj(u)) · up_proj(u))`.
    fused: the same with gate and up, in this order, the rows of one projection: `input_linear`, then `output_linear`.
    gate_multiplier, down_multiplier: of what gate_proj and down_proj give (Falcon-H1).
    token_gate: all that times `sigmoid(token_gate(u))`, one number a token (Qwen3-Next's shared expert).
    """

    word = "feed_forward"

    d_hidden: int
    activation: Activation = "gelu"
    gated: bool = False
    fused: bool = False
    projection_bias: bool = False
    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0
    token_gate: bool = False

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, with_bias = self.d_model, self.projection_bias
        for leaf, outputs in self.hidden.inward:
            yield from self.linear(at, layer, leaf, outputs, d, with_bias=with_bias)
        yield from self.linear(at, layer, self.hidden.outward, d, self.d_hidden, with_bias=with_bias)
        if self.token_gate:
            yield from self.linear(at, layer, "token_gate", 1, d, kind="token_gate")

    @property
    def hidden(self) -> Hidden:
        """What happens between the projections."""
        return Hidden(self.d_hidden, self.activation, self.gated, self.fused, self.gate_multiplier)

    def module(self, parts: Parts, scan: Scan | None = None) -> FeedForwardMixing:
        return FeedForwardMixing(self, parts)

    @property
    def entrances(self) -> tuple[str, ...]:
        return (*(leaf for leaf, _ in self.hidden.inward), *(("token_gate",) if self.token_gate else ()))

    def foldings(self, at: str) -> Iterator[Folding]:
        linear = self.hidden.linear
        if linear is not None:
            leaf, start = linear
            outward = (f"{self.component(at, self.hidden.outward)}.weight",)
            yield Folding(self.rows(at, leaf, start, with_bias=self.projection_bias), outward, self.d_hidden)

    @property
    def token_floats(self) -> int:
        return 8 * self.d_model + 8 * self.d_hidden


class FeedForwardMixing(Mixing):
    """The module of `FeedForward`; it carries nothing."""

    def __init__(self, block: FeedForward, parts: Parts) -> None:
        super().__init__()
        self.hidden = block.hidden
        self.inward = nn.ModuleList(parts[leaf] for leaf, _ in self.hidden.inward)
        self.outward = parts[self.hidden.outward]
        self.down_multiplier = block.down_multiplier
        self.token_gate = parts["token_gate"] if block.token_gate else None

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        y: Tensor = self.outward(self.hidden.of(*(project(u) for project in self.inward)))
        if self.down_multiplier != 1.0:
            y = y * self.down_multiplier
        return (y if self.token_gate is None else y * self.token_gate(u).sigmoid()), ()

    def emit(self, program: Program, u: Value, into: Into) -> None:
        products, size = [program.product(project, u) for project in self.inward], self.hidden.size
        gate = products[0].part(0, size)
        up = products[0].part(size, size) if self.hidden.fused else products[-1]
        rows = [value.structure for value in (gate, up, gate)]
        program.call("hidden", kernels.HiddenValues(*rows, self.hidden.structure))
        if self.token_gate is None and self.down_multiplier == 1.0:
            program.product(self.outward, gate, into)
            return
        y = program.product(self.outward, gate)
        if self.down_multiplier != 1.0:
            program.scaled(y, self.down_multiplier, into if self.token_gate is None else Into(y))
        if self.token_gate is not None:
            factor = program.product(self.token_gate, u)
            rows = [value.structure for value in (y, factor, into.value)]
            program.call("token_gate", kernels.TokenGate(*rows, y.width, into.adds))
