"""What a block is: one kind of residual branch, without its norm and its place in a model.

Dimensions: `b` batch, `l` length, `d` model.

A `Block` is a value: its sizes, the parameters that follow from them, and how to make its module. The module takes
inputs that are normalised already and knows neither file names nor neighbours; norm, multipliers and residual are the
branch's (`model.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ssm_mp.blocks.folding import Folding, Rows
from ssm_mp.modules.convolution import ConvolutionForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter, bias, weight
from ssm_mp.modules.value import ValueForm
from ssm_mp.precisions.stored import Stored
from ssm_mp.programs.program import Into, NotCompiledError, Program, Value

State = tuple[Tensor, ...]
"""What a block carries from token to token, each tensor `[b, …]`; empty where it looks at one token at a time."""

Scan = Callable[..., Any]
"""A block's recurrence over many tokens; its signature is the block's own."""


@dataclass(frozen=True)
class Parts:
    """Component modules by name, seen from inside one block: `names` translates the block's own names."""

    modules: Mapping[str, nn.Module]
    prefix: str = ""
    names: Mapping[str, str] | None = None

    def name(self, leaf: str) -> str:
        """The component's name in the whole model."""
        return self.prefix + renamed(leaf, self.names or {})

    def __getitem__(self, leaf: str) -> nn.Module:
        return self.modules[self.name(leaf)]

    def value(self, leaf: str) -> Stored:
        """A component that is a bare stored value, such as `A_log`."""
        module = self[leaf]
        assert isinstance(module, Stored)
        return module


def renamed(leaf: str, names: Mapping[str, str]) -> str:
    """A block's own dotted name, each piece of it as `names` translates it."""
    return ".".join(names.get(piece, piece) for piece in leaf.split("."))


class Mixing(nn.Module, ABC):
    """The module of a block."""

    @abstractmethod
    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        """`u [b, l, d]`, normalised, and the state before it (None: the beginning) → `[b, l, d]`, before the residual,
        and the state after its last token. Neither argument is changed."""

    def emit(self, program: Program, u: Value, into: Into) -> None:
        """Have `forward` computed by the kernels: of `u`, its state carried by `program.state`, outputs to `into`.

        Raises NotCompiledError where they cannot.
        """
        raise NotCompiledError(f"no kernel computes {type(self).__name__}")


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """Sizes of a block.

    names: the family's words for the block's own names of its components, such as ("o_proj", "out_proj").
    A projection's kind is the family's word; every other kind is the field's (`A_log`, `D`, `norm`, `router`, …).
    """

    d_model: int
    names: tuple[tuple[str, str], ...] = ()

    word: ClassVar[str]
    """What files say for this kind of block."""
    gathers_tokens: ClassVar[bool] = False
    """Whether components see tokens of several sequences together, so that a stack of maps cannot run each for itself
    on the sequences that have it."""
    differentiable: ClassVar[Scan | None] = None
    """The scan that gradients pass through, where the default one does not let them."""

    @abstractmethod
    def parameters(self, at: str, layer: int) -> Iterator[Parameter]:
        """Every tensor, in the order of the data flow; `at` is where the block stands, such as `layers.0.mixer`."""

    @abstractmethod
    def module(self, parts: Parts, scan: Scan | None = None) -> Mixing:
        """The module out of its components' modules; `scan`: in place of the block's fast one."""

    @property
    @abstractmethod
    def token_floats(self) -> int:
        """Upper bound of the float32 numbers of activations that one token takes at the block's widest point."""

    @property
    @abstractmethod
    def entrances(self) -> tuple[str, ...]:
        """The block's own names of the components that multiply its inputs; nothing else sees them."""

    def foldings(self, at: str) -> Iterator[Folding]:
        """Where scales can be moved within the block, from what makes the inputs of a product to its weight."""
        yield from ()

    @property
    def unfoldable(self) -> tuple[str, ...]:
        """The block's own names of the components whose inputs come out of its mixing, and through no place that scales
        could be folded into: at static int8 their inputs are scaled as they are rounded."""
        return ()

    def rows(self, at: str, leaf: str, start: int = 0, *, with_bias: bool = False) -> tuple[Rows, ...]:
        """Rows of a component's weight, and of its bias."""
        name = self.component(at, leaf)
        weights = Rows(f"{name}.weight", start)
        return (weights, Rows(f"{name}.bias", start)) if with_bias else (weights,)

    def component(self, at: str, leaf: str) -> str:
        """A component's name in the whole model."""
        return f"{at}.{renamed(leaf, dict(self.names))}"

    def linear(
        self,
        at: str,
        layer: int,
        leaf: str,
        outputs: int,
        inputs: int,
        *,
        with_bias: bool = False,
        kind: str | None = None,
    ) -> Iterator[Parameter]:
        """A projection `[outputs, inputs]`. kind: by default the last piece of its name."""
        name, form = self.component(at, leaf), LinearForm()
        kind = kind or name.rsplit(".", 1)[-1]
        yield weight(name, kind, layer, form, outputs, inputs)
        if with_bias:
            yield bias(name, kind, layer, form, outputs)

    def convolution(
        self, at: str, layer: int, leaf: str, channels: int, kernel: int, *, with_bias: bool, activation: bool = True
    ) -> Iterator[Parameter]:
        """A depthwise convolution `[channels, 1, kernel]`."""
        name, form = self.component(at, leaf), ConvolutionForm(activation)
        yield weight(name, "conv1d", layer, form, channels, 1, kernel)
        if with_bias:
            yield bias(name, "conv1d", layer, form, channels)

    def norm(self, at: str, layer: int, leaf: str, size: int, form: NormForm) -> Iterator[Parameter]:
        """A norm within the block."""
        return form.parameters(self.component(at, leaf), layer, size)

    def value(self, at: str, layer: int, leaf: str, *shape: int) -> Parameter:
        """A bare value, whose kind is the field's name for it."""
        name = self.component(at, leaf)
        return Parameter(
            name, shape, name, leaf.rsplit(".", 1)[-1], layer, "weight" if len(shape) > 1 else "vector", ValueForm()
        )
