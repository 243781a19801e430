"""Experts: a router sends each token to a few feed-forwards.

Dimensions: `d` model, `q` inputs and outputs of an expert, `E` hidden, `X` experts, `m` tokens, `c` chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan, State
from ssm_mp.blocks.folding import Folding
from ssm_mp.blocks.hidden import Activation, Hidden
from ssm_mp.blocks.routing import Routing
from ssm_mp.kernels import experts as kernels
from ssm_mp.modules.experts import EachExpert, ExpertsForm, ExpertsLinear
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.parameter import Parameter, weight
from ssm_mp.programs.program import Into, NotCompiledError, Program, Value


@dataclass(frozen=True, kw_only=True)
class Experts(Block):
    """Each token goes to its `top_k` best experts, whose outputs are added up by the router's weights.

    activation, gated, fused: of each expert, as in `FeedForward`.
    latent: the experts work on so many numbers a token, to which one projection leads and from which another leads
    back (Nemotron 3).
    together: one component for each kind of projection, `[X · outputs, inputs]`, in place of one for each expert.
    """

    word = "experts"
    gathers_tokens = True

    d_hidden: int
    experts: int
    top_k: int
    routing: Routing = field(default_factory=Routing)
    activation: Activation = "gelu"
    gated: bool = False
    fused: bool = False
    latent: int | None = None
    latent_bias: bool = False
    together: bool = False

    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        d, width = self.d_model, self.width
        router = self.component(at, "router")
        yield weight(router, "router", layer, LinearForm(in_float32=True), self.experts, d)
        if self.routing.corrected:
            yield self.value(at, layer, "correction_bias", self.experts)
        if self.latent is not None:
            yield from self.linear(at, layer, "latent_in", width, d, with_bias=self.latent_bias)
        projections = (
            *((leaf, n, width) for leaf, n in self.hidden.inward),
            (self.hidden.outward, width, self.d_hidden),
        )
        if self.together:
            for leaf, outputs, inputs in projections:
                name, form = self.component(at, f"experts.{leaf}"), ExpertsForm(self.experts)
                yield weight(name, name.rsplit(".", 1)[-1], layer, form, self.experts * outputs, inputs)
        else:
            for e in range(self.experts):
                for leaf, outputs, inputs in projections:
                    yield from self.linear(at, layer, f"experts.{e}.{leaf}", outputs, inputs)
        if self.latent is not None:
            yield from self.linear(at, layer, "latent_out", d, width, with_bias=self.latent_bias)

    @property
    def entrances(self) -> tuple[str, ...]:
        if self.latent is not None:
            return ("router", "latent_in")
        inward = [leaf for leaf, _ in self.hidden.inward]
        if self.together:
            return ("router", *(f"experts.{leaf}" for leaf in inward))
        return ("router", *(f"experts.{e}.{leaf}" for e in range(self.experts) for leaf in inward))

    def foldings(self, at: str) -> Iterator[Folding]:
        linear = self.hidden.linear
        if linear is None or self.together:  # together, each expert would have its own rows and columns
            return
        for e in range(self.experts):
            outward = (f"{self.component(at, f'experts.{e}.{self.hidden.outward}')}.weight",)
            yield Folding(self.rows(at, f"experts.{e}.{linear[0]}", linear[1]), outward, self.d_hidden)

    @property
    def width(self) -> int:
        """Inputs and outputs of an expert."""
        return self.d_model if self.latent is None else self.latent

    @property
    def hidden(self) -> Hidden:
        """What happens between an expert's projections."""
        return Hidden(self.d_hidden, self.activation, self.gated, self.fused)

    def module(self, parts: Parts, scan: Scan | None = None) -> ExpertsMixing:
        return ExpertsMixing(self, parts, scan or chosen_experts)

    @property
    def token_floats(self) -> int:
        chosen = min(self.top_k, self.experts)
        return 8 * self.d_model + 4 * self.width + 8 * self.d_hidden + 6 * self.experts + 12 * chosen


class ExpertsMixing(Mixing):
    """The module of `Experts`; it carries nothing. Its `scan`, as `chosen_experts`, adds up what experts make."""

    def __init__(self, block: Experts, parts: Parts, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        self.routing, self.top_k, self.experts = block.routing, block.top_k, block.experts
        self.hidden = block.hidden
        self.router = parts["router"]
        self.correction_bias = parts.value("correction_bias") if block.routing.corrected else None
        self.latent_in = None if block.latent is None else parts["latent_in"]
        self.latent_out = None if block.latent is None else parts["latent_out"]
        self.inward = nn.ModuleList(_projection(block, parts, leaf) for leaf, _ in self.hidden.inward)
        self.outward = _projection(block, parts, self.hidden.outward)

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        v = u.reshape(-1, u.shape[-1])  # [m, d]
        correction = None if self.correction_bias is None else self.correction_bias.tensor()
        weights, chosen = self.routing(self.router(v), correction, self.top_k)  # [m, c] each
        inputs = v if self.latent_in is None else self.latent_in(v)  # [m, q]
        out: Tensor = self.scan(self, inputs, weights, chosen)
        return (out if self.latent_out is None else self.latent_out(out)).reshape(u.shape), ()

    def emit(self, program: Program, u: Value, into: Into) -> None:
        if self.scan is not chosen_experts:
            raise NotCompiledError("another way to compute experts is asked for")
        logits = program.product(self.router, u)
        x = u if self.latent_in is None else program.product(self.latent_in, u)
        y = into if self.latent_out is None else Into(program.new(x.width))
        merit = program.new(self.experts + self.routing.groups)
        rows = [value.structure for value in (x, logits, merit, y.value)]
        parts: dict[nn.Module, int] = {}
        projections = [self._projections(program, parts, expert, x.width) for expert in range(self.experts)]
        rooms = [max(p.matrix.n for own in projections for p in own[start:end]) for start, end in ((0, -1), (-1, None))]
        correction = program.optional(self.correction_bias)
        what = kernels.Experts(
            *rows, y.adds, x.width, len(self.inward), *rooms,
            self.routing.structure(self.experts, self.top_k, correction), self.hidden.structure,
            kernels.listed([p for own in projections for p in own]),
        )  # fmt: skip
        program.call("experts", what)
        if self.latent_out is not None:
            program.product(self.latent_out, y.value, into)

    def _projections(
        self, program: Program, parts: dict[nn.Module, int], expert: int, width: int
    ) -> list[kernels.Projection]:
        """One expert's projections: those of `width` inputs, then that of what is hidden. parts: the numbers of
        components, to which those that are new are added."""
        found = []
        for module, inputs in (*((inward, width) for inward in self.inward), (self.outward, self.hidden.size)):
            if not isinstance(module, EachExpert | ExpertsLinear):
                raise NotCompiledError(f"{type(module).__name__} in place of projections of experts")
            linear, above = module.part(expert)
            matrix, component = program.matrix(linear), module.component(expert)
            if matrix.k != inputs:
                raise NotCompiledError(f"a product of {matrix.k} inputs with {inputs}")
            if component not in parts:
                parts[component] = program.part(component)
            found.append(kernels.Projection(matrix, above, parts[component]))
        return found


def chosen_experts(mixing: ExpertsMixing, inputs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """`inputs [m, q]`, weights and numbers of experts `[m, c]` → `[m, q]`: each token's experts, one after another.

    A token's summands are added in the order of its experts' numbers, whatever other tokens there are; a token
    comes once in an expert's share, so that no sum depends on the order in which threads get to it.
    """
    out = torch.zeros_like(inputs)
    flat = chosen.flatten()
    shares = torch.bincount(flat, minlength=mixing.experts).tolist()
    order = flat.argsort(stable=True)  # the choices, expert after expert, and in the order of tokens for each
    tokens, factors = order // chosen.shape[1], weights.flatten()[order]
    start = 0
    for expert, share in enumerate(shares):
        if share:
            part = slice(start, start + share)
            x, start = inputs[tokens[part]], start + share
            hidden = mixing.hidden.of(*(project(x, expert) for project in mixing.inward))
            out.index_add_(0, tokens[part], mixing.outward(hidden, expert) * factors[part, None])
    return out


def _projection(block: Experts, parts: Parts, leaf: str) -> nn.Module:
    """One kind of projection of all experts, called with tokens and an expert's number."""
    if block.together:
        return parts[f"experts.{leaf}"]
    return EachExpert(parts[f"experts.{e}.{leaf}"] for e in range(block.experts))
