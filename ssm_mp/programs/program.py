"""Blocks write down what the kernels compute for them: a program, for a branch of a model or for a whole one.

A block says it call by call, in the order of its readable `forward`, with which tests compare it. What flows from call
to call are `Value`s.

Dimensions: `b` sequences, `l` tokens of each, `d` model.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from ssm_mp.kernels import matrices
from ssm_mp.kernels import program as kernels
from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.embedding import BlockedEmbedding, Embedding
from ssm_mp.modules.linear import Linear
from ssm_mp.modules.norm import Norm
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.stored import FloatTensor, Stored

_MOST_LAID = 1 << 22
"""Bytes up to which a weight is laid out whole, by each thread, once for all passes; larger ones panel by panel."""


class NotCompiledError(Exception):
    """Why torch computes something, and not the kernels."""


class UnknownWeightError(NotCompiledError):
    """A weight is stored in a way that the kernels do not know."""


@dataclass(frozen=True)
class Value:
    """A value of `width` numbers a token. at: as in `program.h`, `ld` numbers from one token's to the next one's."""

    at: int
    ld: int
    column: int
    width: int

    def part(self, start: int, width: int) -> Value:
        """Some neighbouring columns."""
        return replace(self, column=self.column + start, width=width)

    def split(self, widths: Sequence[int]) -> list[Value]:
        """Neighbouring columns, of so many each."""
        ends = list(accumulate(widths))
        return [self.part(end - width, width) for end, width in zip(ends, widths, strict=True)]

    @property
    def structure(self) -> kernels.Rows:
        """As the kernels take it."""
        return kernels.Rows(self.at, self.ld, self.column)


@dataclass(frozen=True)
class Into:
    """Where a block's outputs go. adds: to what is there."""

    value: Value
    adds: bool = False


@dataclass(frozen=True)
class Carried:
    """A tensor of a block's state, and how the kernels hold it.

    shape: of what they hold, float32, by sequences and by tokens that there must be room for. view: of that, after so
    many tokens, the tensor that the block's `forward` takes and gives. grows: it has a token more after each, along its
    third dimension.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    view: Callable[[Tensor, int], Tensor] = lambda held, tokens: held
    grows: bool = False


class Program:
    """Calls, and all that they read, held for as long as this lives."""

    def __init__(self, d_model: int, *, many: bool) -> None:
        """many: for many rows at a time, or else for few."""
        self.many = many
        self.stream = Value(kernels.STREAM, d_model, 0, d_model)
        self.carried: list[Carried] = []
        self.parts: list[nn.Module] = []
        self.calls = kernels.Calls(d_model)
        self._held: list[Tensor | Matrix] = []
        self._used = self._most = 0

    def new(self, width: int) -> Value:
        """Room for a value."""
        at, self._used = self._used, self._used + width
        self._most = max(self._most, self._used)
        return Value(at, width, 0, width)

    def forget_values(self) -> None:
        """What was written so far is not read any more, but for the stream."""
        self._used = 0

    def close(self, results: int = 0) -> None:
        """Everything is said. results: numbers of a row that are written to `RESULT`."""
        self.calls.close(self._most, results)

    def floats(self, values: Tensor) -> int:
        """Where a copy of these values lies, float32 and contiguous."""
        self._held.append(values.detach().float().clone(memory_format=torch.contiguous_format))
        return self._held[-1].data_ptr()  # type: ignore[union-attr]

    def optional(self, stored: Stored | None) -> int | None:
        """The same of a tensor that may be missing."""
        return None if stored is None else self.floats(stored.tensor())

    def state(self, carried: Carried) -> int:
        """The number of a further tensor of the block's state, in the order of `forward`'s."""
        self.carried.append(carried)
        return len(self.carried) - 1

    def part(self, module: nn.Module) -> int:
        """The number under which the time is told that a component takes."""
        self.parts.append(module)
        return len(self.parts) - 1

    def call(self, kernel: str, what: ctypes.Structure, component: nn.Module | None = None) -> None:
        """`<kernel>_run` of C; component: whose time it takes."""
        self.calls.append(kernel, what, -1 if component is None else self.part(component))

    def matrix(self, module: nn.Module) -> matrices.Matrix:
        """A weight's structure. The module may make its own anew at any time: this one lives on here."""
        if isinstance(module, Stored):
            matrix = self._of_value(module)
        elif isinstance(module, Linear | Embedding):
            matrix = self._of_projection(module)
        else:
            raise NotCompiledError(f"{type(module).__name__} in place of a projection")
        self._held.append(matrix)
        return matrix.structure

    def _of_projection(self, module: Linear | Embedding) -> Matrix:
        if module.rounding is not None:
            raise NotCompiledError("inputs are rounded as another runtime rounds them")
        matrix = module.matrix()
        if matrix is None:
            stored = type(module.weight).__name__
            raise UnknownWeightError(f"the kernels do not know a weight that is stored as {stored}")
        if self.many and not matrix.suits_program:
            raise NotCompiledError("torch multiplies many rows faster")
        return matrix

    def _of_value(self, value: Stored) -> Matrix:
        """A bare value is small enough to be unpacked where it cannot be read as it is."""
        matrix = Matrix.of(value)
        if matrix is None or (self.many and not matrix.suits_program):
            matrix = Matrix.of(FloatTensor(value.tensor()))
        assert matrix is not None
        return matrix

    def product(self, module: nn.Module, x: Value, into: Into | None = None) -> Value:
        """`module(x)`, a projection; of a bare value `[n, k]`, its products with x."""
        matrix = self.matrix(module)
        if matrix.k != x.width:
            raise NotCompiledError(f"a product of {matrix.k} inputs with {x.width}")
        into = Into(self.new(matrix.n)) if into is None else into
        what = kernels.Product(matrix, x.structure, into.value.structure, into.adds, -1)
        if self.many and kernels.packed_bytes(what.matrix) <= _MOST_LAID:
            what.laid = self.calls.lay(what.matrix)
        self.call("product", what, module)
        return into.value

    def norm(self, norm: nn.Module, x: Value, y: Value | None = None, repeats: int = 1) -> Value:
        """`norm(x)`; of each of `repeats` neighbouring pieces of a row for itself. y: may be x."""
        if not isinstance(norm, Norm):
            raise NotCompiledError(f"{type(norm).__name__} in place of a norm")
        y = self.new(x.width) if y is None else y
        weight, bias = self.floats(norm.factors()), self.optional(norm.bias)
        width = x.width // repeats
        self.call("norm", kernels.Norm(x.structure, y.structure, width, repeats, weight, bias, norm.eps), norm)
        return y

    def weightless_norm(self, x: Value, eps: float, y: Value | None = None) -> Value:
        """RMSNorm without a weight."""
        y = self.new(x.width) if y is None else y
        ones = self.floats(torch.ones(x.width))
        self.call("norm", kernels.Norm(x.structure, y.structure, x.width, 1, ones, None, eps))
        return y

    def convolution(self, conv: nn.Module, x: Value) -> Value:
        """`conv(x)`, whose last inputs are the next tensor of the block's state."""
        if not isinstance(conv, DepthwiseConv):
            raise NotCompiledError(f"{type(conv).__name__} in place of a convolution")
        taps = conv.weight.tensor()[:, 0]  # [I, K]
        width, kernel = taps.shape
        y = self.new(width)
        number = self.state(Carried(lambda batch, capacity: (batch, kernel - 1, width)))
        what = kernels.Convolution(
            x.structure, y.structure, width, kernel, conv.activation, self.floats(taps.t()), self.optional(conv.bias),
            number,
        )  # fmt: skip
        self.call("convolution", what, conv)
        return y

    def lookup(self, embedding: nn.Module, factor: float, positions: Tensor | None) -> None:
        """The embedded tokens · factor, and the rows of their positions of `positions [T, d]`, into the stream."""
        block_of = row_of = None
        modules = [embedding]
        if isinstance(embedding, BlockedEmbedding):
            modules = list(embedding.blocks)
            block_of, row_of = self._integers(embedding.block_of), self._integers(embedding.row_of)
        blocks = [self.matrix(module) for module in modules]
        held = (matrices.Matrix * len(blocks))(*blocks)
        table = None if positions is None else self.floats(positions)
        vocabulary = sum(block.n for block in blocks)
        what = kernels.Lookup(
            held, block_of, row_of, vocabulary, self.stream.width, self.stream.structure, factor, table
        )
        self.call("lookup", what)

    def _integers(self, values: Tensor) -> int:
        """Where a copy of these int64 values lies."""
        self._held.append(values.clone(memory_format=torch.contiguous_format))
        return self._held[-1].data_ptr()  # type: ignore[union-attr]

    def scaled(self, x: Value, factor: float, into: Into | None = None) -> Value:
        """`x · factor`; into: may be x."""
        into = Into(self.new(x.width)) if into is None else into
        self.call("scaled", kernels.Scaled(x.structure, into.value.structure, x.width, factor, into.adds))
        return into.value


def say_once(error: NotCompiledError) -> None:
    """Say, once a process, that a weight makes computing slower. That torch is faster, or stands in, is no news."""
    if isinstance(error, UnknownWeightError):
        _say(str(error))


@cache
def _say(reason: str) -> None:
    logging.getLogger("ssm_mp").warning("note: computing by torch in place of compiled blocks, slower: %s", reason)
