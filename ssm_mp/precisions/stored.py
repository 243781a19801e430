"""How a tensor is held: as floats, as int8 rows, as packed groups, or as plain bytes.

Dimensions: `r` rows, `n` values in a row, `g` groups of 64 values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from ssm_mp.precisions.groups import CodeBook, unpack_at, unpack_values
from ssm_mp.precisions.quantize import dequantize_rows, fits_product, integer_product, padded_weight

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

    @abstractmethod
    def tensor(self) -> Tensor:
        """The whole tensor, float32, to compute with."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of a matrix `[r, n]` by `index [...]`, float32 `[..., n]`, without unpacking the others."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """The stored arrays by suffix; the empty suffix is the tensor's own name."""


class FloatTensor(Stored):
    """A tensor stored in a floating-point type."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    @property
    def is_trained(self) -> bool:
        return self.value.requires_grad

    def tensor(self) -> Tensor:
        return self.value.float()

    def rows(self, index: Tensor) -> Tensor:
        return self.value[index].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"": self.value.data}


class Int8Tensor(Stored):
    """A tensor stored as int8 with one float16 scale a row, a row being one index of the first dimension.

    A vector has a single scale.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self._fits = fits_product(q.shape)
        self._padded: Tensor | None = None  # on a GPU, where it does not fit

    def product(self, a: Tensor) -> Tensor:
        """`a [m, n]`, int8, times this matrix transposed: int32 `[m, r]`.

        On a GPU, a matrix of sizes that its product does not take is padded once, at the first product.
        """
        q = self.q
        if self._fits or not q.is_cuda:
            return integer_product(a, q)
        if self._padded is None or self._padded.device != q.device:
            self._padded = padded_weight(q)
        return integer_product(a, self._padded)[:, : q.shape[0]]

    def tensor(self) -> Tensor:
        rows = self.q.reshape(self.scale.shape[0], -1)
        return dequantize_rows(rows, self.scale).reshape(self.q.shape)

    def rows(self, index: Tensor) -> Tensor:
        return self.q[index].float() * self.scale[index].float()[..., None]

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class GroupedTensor(Stored):
    """A tensor stored as packed codes `q [g, 8·bits]`, uint8, with one float16 scale a group of 64 values."""

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, shape: tuple[int, ...], book: CodeBook) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.shape = shape
        self.book = book

    def tensor(self) -> Tensor:
        return unpack_values(self.q, self.scale, self.book).flatten()[: prod(self.shape)].reshape(self.shape)

    def rows(self, index: Tensor) -> Tensor:
        width = self.shape[1]
        positions = index[..., None] * width + torch.arange(width, device=index.device)  # [..., n]
        codes = unpack_at(self.q.flatten(), self.book.bits, positions)
        levels = self.book.levels(index.device)
        return levels[codes] * self.scale[positions // (self.q.shape[1] * 8 // self.book.bits)].float()

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


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
