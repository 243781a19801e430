"""Linear layers, whatever precision each is stored in.

Dimensions: `b` batch, `l` length, `m` tokens (`b·l`), `n` outputs, `k` inputs of a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.kernels import calls, cuda
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.modules.inputs import InputQuantizer, Rounding, StaticInput
from ssm_mp.modules.likelihood import likelihood_of, token_divergence, token_nll
from ssm_mp.precisions.matrix import FEW_ROWS, Head, Inputs, Matrix
from ssm_mp.precisions.stored import FloatTensor, IntegerTensor, RowsOf, Stored

_MOST_UNPACKED = 1 << 27
"""Bytes in float32 above which a head stays packed, and is unpacked a slice at a time for many tokens."""
_TOKENS = 1024
"""Tokens at least of a product with parts of a head, where there are so many: fewer wait for the weights to be read."""


def linear(
    x: Tensor, weight: Stored, bias: Stored | None, inputs: InputQuantizer | None, *, in_float32: bool = False
) -> Tensor:
    """`x [..., k]` times `weight [n, k]` transposed, plus `bias [n]`: float32 `[..., n]`.

    With an input quantiser the product is one of integers, accumulated in int32. Without one, a quantised
    weight is unpacked first, and a float16 weight computes in float16 on a GPU, unless told to do so in float32. This
    is how a precision computes that the kernels do not know.
    """
    if isinstance(inputs, Rounding):
        x, inputs = inputs(x), None
    if inputs is not None:
        assert isinstance(weight, IntegerTensor)
        flat = x.reshape(-1, x.shape[-1])  # [m, k]
        quantized, input_scale = inputs(flat)
        offsets, integers = None if bias is None else bias.tensor(), weight.integers
        if integers is not None and cuda.usable(input_scale):
            product = cuda.scaled_product(quantized, integers, weight.scale, input_scale, offsets)
        else:
            product = rescaled(weight.product(quantized), weight.scale.float(), input_scale, offsets)
        return product.reshape(*x.shape[:-1], -1)
    if x.is_cuda and not in_float32 and type(weight) is FloatTensor and weight.value.dtype == torch.float16:
        half_bias = None if bias is None else bias.tensor().half()
        return F.linear(x.half(), weight.value, half_bias).float()
    return F.linear(x, weight.tensor(), None if bias is None else bias.tensor())


def rescaled(sums: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """int32 `sums [m, n]` · scales `columns [n]` and `rows [m, 1]`, plus `bias [n]`: float32 `[m, n]`."""
    kernels = kernels_for(columns, rows)
    if kernels is not None:
        return kernels.rescale(sums, columns, rows, bias)
    product = sums.float().mul_(columns).mul_(rows)
    return product if bias is None else product.add_(bias)


@dataclass(frozen=True, eq=False)
class Projection:
    """Products with the same inputs side by side, each `(weight, bias, input quantiser)`, ready for many calls.

    head: of a single product, where kernels take it straight from its inputs to likelihoods. rounding: of the inputs of
    all of them, before anything else.
    """

    parts: Sequence[tuple[Stored, Stored | None, InputQuantizer | None]]
    head: Head | None = None
    rounding: Rounding | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`, one part after another."""
        return self._product(self._rounded(x))

    @cached_property
    def _unpacked(self) -> Projection:
        """The same, its weights unpacked once for all calls and threads, unless they multiply integers."""
        own = [
            FloatTensor(weight.tensor()) if _is_packed(weight, inputs) else weight for weight, _, inputs in self.parts
        ]
        parts = [(weight, bias, inputs) for weight, (_, bias, inputs) in zip(own, self.parts, strict=True)]
        return replace(self, parts=parts)

    @property
    def _is_packed(self) -> bool:
        return any(_is_packed(weight, inputs) for weight, _, inputs in self.parts)

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.rounding is None else self.rounding(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.head is not None and self.head.matrix.suits_many and calls.usable(x):
            return self.head.matrix.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        found = [linear(x, *part) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def nll(self, x: Tensor, columns: Tensor, held: int) -> Tensor:
        """Negative log-likelihood of `columns [m]` where the products of `x [m, k]` are logits: float64 `[m]`.

        held: for how many tokens at most there may be logits in memory, or as many logits of parts of more tokens.
        """
        return self._nll_of(self._rounded(x), columns, held)

    def _nll_of(self, x: Tensor, columns: Tensor, held: int) -> Tensor:
        if self.head is not None and calls.usable(x):
            return self.head.nll(x, columns)
        tokens = min(_TOKENS, x.shape[0])
        if (
            (held < tokens or self._is_packed)
            and x.device.type == "cpu"
            and all(_is_cut_by_rows(weight, bias) for weight, bias, _ in self.parts)
        ):
            width = max(1, held * sum(_outputs(weight) for weight, *_ in self.parts) // tokens)
            chunks = zip(x.split(tokens), columns.split(tokens), strict=True)
            return torch.cat([self._nll_by_outputs(*chunk, width) for chunk in chunks])
        return torch.cat([self._nll(*part) for part in zip(x.split(held), columns.split(held), strict=True)])

    def divergence(
        self, x: Tensor, columns: Tensor, reference: Projection, expected: Tensor, held: int
    ) -> tuple[Tensor, Tensor]:
        """`nll`, the very same numbers, and KL(reference ‖ this) of each token's logits: float64 `[m]` each.

        Logits are those of `x [m, k]` here and of `expected [m, k]` there.
        """
        if self.head is not None and reference.head is not None and calls.usable(x, expected):
            return self.head.divergence(self._rounded(x), columns, reference.head, reference._rounded(expected))
        chunks = zip(x.split(held), expected.split(held), strict=True)
        own, other = self._unpacked, reference._unpacked
        kl = torch.cat([token_divergence(own(ours), other(theirs)) for ours, theirs in chunks])
        return self.nll(x, columns, held), kl

    def another_top(self, x: Tensor, reference: Projection, expected: Tensor, held: int) -> Tensor:
        """Whether the largest logit of `x [m, k]` here is another than that of `expected [m, k]` there: bool `[m]`."""
        own, other = self._unpacked, reference._unpacked
        chunks = zip(x.split(held), expected.split(held), strict=True)
        return torch.cat([own(ours).argmax(dim=-1) != other(theirs).argmax(dim=-1) for ours, theirs in chunks])

    def _nll(self, x: Tensor, columns: Tensor) -> Tensor:
        weight, bias, inputs = self.parts[0]
        if len(self.parts) == 1 and inputs is not None and bias is None and x.device.type == "cpu":
            return self._nll_by_outputs(x, columns, _outputs(weight))
        return token_nll(self._product(x), columns)

    def _nll_by_outputs(self, x: Tensor, columns: Tensor, width: int) -> Tensor:
        """`nll` from the logits of `width` outputs at a time, so that weights are read once for many tokens."""
        likelihood, first = likelihood_of(columns, x), 0
        for weight, _, inputs in self.parts:
            integers, scales = (x, None) if inputs is None else inputs(x)
            for rows in _cut_by_rows(weight, width):
                if scales is None:
                    likelihood.add(F.linear(x, rows.tensor()), first)
                else:
                    assert isinstance(rows, IntegerTensor)
                    likelihood.add_scaled(rows.product(integers), rows.scale.float(), scales, first)
                first += _outputs(rows)
        return likelihood.nll()


def _outputs(weight: Stored) -> int:
    return weight.scale.shape[0] if isinstance(weight, IntegerTensor) else weight.shape[0]


def _is_packed(weight: Stored, inputs: InputQuantizer | None) -> bool:
    """Whether a weight is unpacked, or widened, each time that it is multiplied."""
    if inputs is not None:
        return False  # it multiplies integers
    # a GPU multiplies float16 as it is
    return type(weight) is not FloatTensor or (weight.value.dtype != torch.float32 and weight.device.type == "cpu")


def _is_cut_by_rows(weight: Stored, bias: Stored | None) -> bool:
    """Whether rows of a weight cost no more than their share of it."""
    return bias is None and not isinstance(weight.part(slice(0, 1))[0], RowsOf)


def _cut_by_rows(weight: Stored, count: int) -> Iterator[Stored]:
    """A weight in parts of so many rows."""
    size = _outputs(weight)
    if count >= size:
        yield weight
        return
    for start in range(0, size, count):
        yield weight.part(slice(start, min(start + count, size)))[0]


class Multiplier(nn.Module):
    """A module with one weight that multiplies its inputs. in_float32: float16 weights too, on every device."""

    def __init__(
        self, weight: Stored, bias: Stored | None, inputs: InputQuantizer | None, *, in_float32: bool = False
    ) -> None:
        """Raises TypeError where inputs are to be quantised for a weight that multiplies no integers."""
        super().__init__()
        self.rounding = inputs if isinstance(inputs, Rounding) else None
        inputs = None if isinstance(inputs, Rounding) else inputs
        if inputs is not None and not isinstance(weight, IntegerTensor):
            raise TypeError(
                f"inputs are quantised for a {type(weight).__name__}, which multiplies no integers: a precision with "
                "quantizes_inputs stores its weights as an IntegerTensor"
            )
        self.in_float32 = in_float32
        self.weight = weight
        self.bias = bias
        self.inputs = inputs
        self._matrix: tuple[object, Matrix | None, object] | None = None

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """How its inputs are quantised, to integers or to floats."""
        return self.inputs or self.rounding

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None}  # addresses cannot be copied

    def multiply(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`."""
        x = x if self.rounding is None else self.rounding(x)
        rows = x.numel() // x.shape[-1]
        if not self._is_float32 and calls.usable(x):
            matrix = self._own_matrix()
            if matrix is not None and (rows <= FEW_ROWS or matrix.suits_many):
                return matrix.product(x.reshape(rows, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return linear(x, self._to_multiply(), self.bias, self.inputs, in_float32=self.in_float32)

    def _to_multiply(self) -> Stored:
        """The weight as many rows are multiplied with it: unpacked, unless its own product takes it packed."""
        if self._is_float32 or self.inputs is not None or self.weight.device.type == "cuda":
            return self.weight
        matrix = self._own_matrix() if calls.compiled() else None
        return FloatTensor(self.weight.tensor() if matrix is None else matrix.unpacked())

    def matrix(self) -> Matrix | None:
        """The weight as the kernels of a CPU read it, made once; None where they do not know how it is stored, or how
        its inputs are rounded."""
        return None if self.rounding is not None else self._own_matrix()

    def _own_matrix(self) -> Matrix | None:
        """The same for inputs that are rounded already."""
        held = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        stamp = ([tensor.stamp for tensor in held], self.inputs_stamp)
        current = self._matrix
        if current is None or current[0] != stamp:
            how: Inputs = "none" if self.inputs is None else "dynamic"
            if isinstance(self.inputs, StaticInput):
                made = Matrix.of(self.weight, self.bias, "static", self.inputs.scale.item())
            else:
                made = Matrix.of(self.weight, self.bias, how)
            # what was read is held too: another tensor in its place would have its stamp
            current = (stamp, made, [tensor.arrays() for tensor in held])
            self._matrix = current
        return current[1]

    def forget(self) -> None:
        """Let go of what was made of the weight, which may be held elsewhere from now on."""
        self._matrix = None

    @property
    def inputs_stamp(self) -> object:
        """Changes whenever the way that inputs are quantised does."""
        if not isinstance(self.inputs, StaticInput):
            return type(self.inputs)
        scale = self.inputs.scale
        return scale.item() if scale.device.type == "cpu" else scale.data_ptr()

    def projection(self) -> Projection:
        """`multiply` for many calls."""
        on_cpu = self.weight.device.type == "cpu" and not self.weight.is_trained
        if self.bias is None and on_cpu and calls.compiled():
            matrix = self._own_matrix()
            if matrix is not None and matrix.takes_many:
                return Projection([(self.weight, self.bias, self.inputs)], Head(matrix), self.rounding)
        weight = self.weight if self._is_cut_packed else self._to_multiply()
        return Projection([(weight, self.bias, self.inputs)], rounding=self.rounding)

    def part(self) -> tuple[Stored, Stored | None, InputQuantizer | None]:
        """As one of several in a `Projection`: the weight is unpacked once."""
        return self._to_multiply(), self.bias, self.input_quantizer

    @property
    def _is_cut_packed(self) -> bool:
        """Whether the weight is so large that it is better unpacked in slices of rows, and can be."""
        weight, bias = self.weight, self.bias
        large = weight.device.type == "cpu" and 4 * prod(weight.shape) > _MOST_UNPACKED
        return large and weight.part(slice(1, 2))[1] == 0 and _is_cut_by_rows(weight, bias)

    @property
    def _is_float32(self) -> bool:
        """Whether torch has nothing to unpack."""
        return type(self.weight) is FloatTensor and self.weight.value.dtype == torch.float32


class Linear(Multiplier):
    """A projection with its optional bias."""

    def __init__(
        self,
        weight: Stored,
        bias: Stored | None = None,
        inputs: InputQuantizer | None = None,
        *,
        in_float32: bool = False,
    ) -> None:
        super().__init__(weight, bias, inputs, in_float32=in_float32)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`."""
        return self.multiply(x)


@dataclass(frozen=True)
class LinearForm:
    """A linear layer. in_float32: a float16 weight multiplies in float32 on a GPU too (routers)."""

    in_float32: bool = False

    @property
    def multiplies_inputs(self) -> bool:
        return True

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        return Linear(tensors["weight"], tensors.get("bias"), inputs, in_float32=self.in_float32)
