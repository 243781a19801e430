"""How a tensor is held: what every way has in common, and those that no precision owns: floats and plain bytes.

Dimensions: `r` rows, `n` values in a row, `m` inputs of a product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from ssm_mp.precisions.quantize import powers_of_two

Role = Literal["weight", "vector", "bias", "index"]
"""`weight`: quantised per row (output channel); `vector`: one scale; `bias`: stored float16 always; `index`: bytes
that no precision changes, not a parameter of the FP32 model."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one stored array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Stored(nn.Module, ABC):
    """One tensor as it is stored."""

    @property
    def device(self) -> torch.device:
        """Where it is held."""
        return next(iter(self.arrays().values())).device

    @property
    def is_trained(self) -> bool:
        """Whether gradients are asked for, so that it will change."""
        return False

    @property
    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever what is held does: place and version of each array."""
        held = (*self._parameters.values(), *self._buffers.values())
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held if t is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor. A way to store that knows it without unpacking says so itself."""
        return tuple(self.tensor().shape)

    def part(self, rows: slice) -> tuple[Stored, int]:
        """Some rows of a matrix, from `start` to `stop`, and how many others it holds before them: whatever cannot be
        cut off. A way to store whose arrays can be cut gives views of them."""
        return RowsOf(self, rows), 0

    @abstractmethod
    def tensor(self) -> Tensor:
        """The whole tensor, float32, to compute with."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of a matrix `[r, n]` by `index [...]`, float32 `[..., n]`, without unpacking the others."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """The stored arrays by suffix; the empty suffix is the tensor's own name."""


class IntegerTensor(Stored):
    """A matrix `[r, n]` of integers with one scale a row, whose product with int8 inputs is one of integers."""

    scale: Tensor
    """Of each row, float16 `[r]`."""

    @property
    def integers(self) -> Tensor | None:
        """The integers as they are held, int8 `[r, n]`; None where they are packed."""
        return None

    def part(self, rows: slice) -> tuple[Stored, int]:
        return IntegerRowsOf(self, rows), 0

    @abstractmethod
    def product(self, a: Tensor) -> Tensor:
        """`a [m, n]`, int8, times the integers of this matrix transposed: int32 `[m, r]`."""


class RowsOf(Stored):
    """Rows of a matrix that is stored in any way."""

    def __init__(self, whole: Stored, rows: slice) -> None:
        super().__init__()
        self.whole = whole
        self.span = rows

    @property
    def is_trained(self) -> bool:
        return self.whole.is_trained

    @property
    def stamp(self) -> tuple[tuple[int, int], ...]:
        return self.whole.stamp

    def tensor(self) -> Tensor:
        return self.whole.rows(torch.arange(self.span.start, self.span.stop, device=self.device))

    def rows(self, index: Tensor) -> Tensor:
        return self.whole.rows(index + self.span.start)

    def arrays(self) -> dict[str, Tensor]:
        """Those of the whole matrix."""
        return self.whole.arrays()


class IntegerRowsOf(RowsOf, IntegerTensor):
    """Rows of a matrix of integers; their product is computed with all others, which is right and no more."""

    whole: IntegerTensor

    def __init__(self, whole: IntegerTensor, rows: slice) -> None:
        super().__init__(whole, rows)
        self.scale = whole.scale[rows]

    def product(self, a: Tensor) -> Tensor:
        return self.whole.product(a)[:, self.span]


class ScaledColumns(IntegerTensor):
    """A matrix `[r, n]` whose columns were multiplied with powers of two, `exponent [n]`, before they were rounded.

    Its product is with inputs that are divided by them first. What it is to others is the matrix itself.
    """

    exponent: Tensor

    def __init__(self, held: Stored, exponent: Tensor) -> None:
        """held: whatever a precision stores that takes integers as inputs."""
        super().__init__()
        assert isinstance(held, IntegerTensor)
        self.held = held
        self.register_buffer("exponent", exponent)  # int8 [n]

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # that of what is held, wherever it is moved to
        return self.held.scale

    @property
    def integers(self) -> Tensor | None:
        return self.held.integers

    @property
    def stamp(self) -> tuple[tuple[int, int], ...]:
        return (*self.held.stamp, *super().stamp)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def product(self, a: Tensor) -> Tensor:
        return self.held.product(a)

    def tensor(self) -> Tensor:
        return self.held.tensor() * powers_of_two(-self.exponent)

    def rows(self, index: Tensor) -> Tensor:
        return self.held.rows(index) * powers_of_two(-self.exponent)

    def arrays(self) -> dict[str, Tensor]:
        return {**self.held.arrays(), "exponent": self.exponent}


class FloatTensor(Stored):
    """A tensor stored in a floating-point type."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    @property
    def is_trained(self) -> bool:
        return self.value.requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def part(self, rows: slice) -> tuple[Stored, int]:
        return type(self)(self.value.data[rows]), 0

    def tensor(self) -> Tensor:
        return self.value.float()

    def rows(self, index: Tensor) -> Tensor:
        return self.value[index].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"": self.value.data}


class SourceTensor(FloatTensor):
    """A tensor of the FP32 model that its file holds in a smaller type, such as bfloat16: always computed in float32.

    Nothing is widened before it is asked for, so that what a file is mapped from stays all that is held.
    """


def source_tensor(value: Tensor) -> FloatTensor:
    """A tensor of an FP32 model, held as its file has it: float32, or a type that is widened when it is computed with.

    A float16 weight of a converted model is none of these: it computes in float16 on a GPU.
    """
    return FloatTensor(value) if value.dtype == torch.float32 else SourceTensor(value)


class ByteTensor(Stored):
    """Packed integers `[bytes]`, the same in every precision; who reads them knows what they mean."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def tensor(self) -> Tensor:
        """The bytes, uint8, not to compute with."""
        return self.value

    def rows(self, index: Tensor) -> Tensor:
        return self.value[index]

    def arrays(self) -> dict[str, Tensor]:
        return {"": self.value}
