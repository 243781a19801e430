"""How the file holds each tensor: its arrays, exactly our codes and scales, and the nodes that compute with them.

A tensor that is a value has its dequantised float32 under its canonical name, so that what is made of it needs to know
nothing more. A matrix may stay packed: `MatMulNBits` and `MatMulBnb4` multiply with it, rows of tables and chosen
experts are dequantised alone.

Dimensions: `n` rows, `k` values in a row, `g` groups of values, `X` experts, `c` chosen ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar

import numpy as np
import torch

from ssm_mp.modules.embedding import EmbeddingForm
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.precisions.float16 import Float16
from ssm_mp.precisions.grouped import INTEGER_BOOKS, NF4_BOOK, Grouped, GroupedTensor
from ssm_mp.precisions.groups import CodeBook, group_count, unpack_reference
from ssm_mp.precisions.int8 import Int8, Int8Tensor
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.runtimes.onnx.nodes import Nodes

SMALLEST_BLOCK = 16
"""Values that share a scale in `MatMulNBits` at least; rows must be a multiple."""


@dataclass(frozen=True)
class Layout(ABC):
    """How a tensor of this shape is held.

    experts: of how many experts it is the projection, `[X · n, k]`; None: of none.
    """

    shape: tuple[int, ...]
    experts: int | None = None

    word: ClassVar[str]
    """What holds it, in the runtime's words."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of its arrays."""

    @abstractmethod
    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        """By the suffixes of their names."""

    @abstractmethod
    def value(self, nodes: Nodes, name: str) -> None:
        """The whole tensor, float32, under its own name."""

    def product(self, nodes: Nodes, name: str, x: str, output: str) -> bool:
        """`x [..., k]` times the matrix transposed; whether it takes the whole value for it."""
        nodes.add("MatMul", [x, nodes.add("Transpose", [name], f"{output}/transposed", perm=[1, 0])], output)
        return True

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        """Rows by their numbers `[...]`: `[..., k]`; whether it takes the whole value for it."""
        nodes.add("Gather", [name, index], output, axis=0)
        return True

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        """The matrices `[n, k]` of chosen experts `[m, c]`: `[m, c, n, k]`; whether it takes the whole value for it."""
        nodes.add("Gather", [nodes.reshape(name, f"{output}/apart", *self.apart), chosen], output, axis=0)
        return True

    @property
    def apart(self) -> tuple[int, ...]:
        """The shape, with the experts apart: `[X, n, k]`."""
        if self.experts is None:
            return self.shape
        return (self.experts, self.shape[0] // self.experts, *self.shape[1:])


class Single(Layout):
    """float32, as it is."""

    word = "float32"

    @property
    def bytes(self) -> int:
        return 4 * prod(self.shape)

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        return {"": stored.tensor().cpu().numpy()}

    def value(self, nodes: Nodes, name: str) -> None:
        """It is its own initialiser."""


class Half(Layout):
    """float16, cast to float32 where it is used."""

    word = "float16"

    @property
    def bytes(self) -> int:
        return 2 * prod(self.shape)

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, FloatTensor)
        return {".float16": stored.value.detach().cpu().numpy().reshape(self.apart)}

    def value(self, nodes: Nodes, name: str) -> None:
        half = f"{name}.float16"
        nodes.cast(half if self.experts is None else nodes.reshape(half, f"{name}/joined", *self.shape), name)

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        nodes.cast(nodes.add("Gather", [f"{name}.float16", index], f"{output}/float16", axis=0), output)
        return False

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        return self.rows(nodes, name, chosen, output)


@dataclass(frozen=True)
class Integers(Layout):
    """int8 with a float16 scale a row; a vector has one scale.

    Not by `DequantizeLinear`: where that meets a product, ONNX Runtime rounds the product's inputs to 8 bits. Nor by
    `MatMulNBits` of 8 bits, which unpacks the whole matrix at every step and is many times as slow. A product that
    is out of constants alone is computed once, when the file is opened: float32 in memory, and as fast.
    """

    vector: bool = False
    word = "int8 · scale"

    @property
    def bytes(self) -> int:
        return prod(self.shape) + 2 * (1 if self.vector else self.shape[0])

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, Int8Tensor)
        scale = (
            stored.scale.cpu().numpy().reshape(() if self.vector else self.apart[: 1 if self.experts is None else 2])
        )
        return {".int8": stored.q.cpu().numpy().reshape(self.apart), ".scale": scale}

    def value(self, nodes: Nodes, name: str) -> None:
        scale = nodes.cast(f"{name}.scale", f"{name}/scale")
        if not self.vector:
            scale = nodes.reshape(scale, f"{name}/factors", -1, *[1] * (len(self.shape) - 1))
        units = nodes.cast(f"{name}.int8", f"{name}/units")
        if self.experts is not None:
            units = nodes.reshape(units, f"{name}/joined", *self.shape)
        nodes.add("Mul", [units, scale], name)

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        """Of few rows, the integers and their scales are gathered first."""
        self._gathered(nodes, name, index, output)
        return False

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        self._gathered(nodes, name, chosen, output)
        return False

    def _gathered(self, nodes: Nodes, name: str, index: str, output: str) -> None:
        """The parts, `[k]` or `[n, k]`, that `index [...]` names."""
        units = nodes.add("Gather", [f"{name}.int8", index], f"{output}/int8", axis=0)
        units = nodes.cast(units, f"{output}/units")
        scale = nodes.add("Gather", [f"{name}.scale", index], f"{output}/float16", axis=0)  # [...], or [..., n]
        scale = nodes.add("Unsqueeze", [nodes.cast(scale, f"{output}/scale"), nodes.integers(-1)], f"{output}/factors")
        nodes.add("Mul", [units, scale], output)


@dataclass(frozen=True)
class Codes(Layout):
    """Four bits a value with a float16 scale a block of values, in the order of the tensor.

    What is not multiplied by an operator that reads codes is dequantised by a table, two codes at a time.
    group: values that share a scale. nf4: codes of `MatMulBnb4`, the first in the high bits; else a value and 8, the
    first in the low bits. block: values that share a scale for the operator, at least: less than a group where rows are
    no multiple of our groups.
    """

    group: int = 0
    nf4: bool = False
    block: int = 0
    word = "4 bits · table"
    per_byte: ClassVar[int] = 2

    @property
    def bytes(self) -> int:
        return self._filled // self.per_byte + 2 * group_count(prod(self.shape), self.group)

    @property
    def _filled(self) -> int:
        """Values, with those that fill up the last block."""
        return -(-prod(self.shape) // self.block) * self.block

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, GroupedTensor)
        codes = (_codes(stored) if self.nf4 else _integers(stored) + 8).astype(np.uint8)
        pairs = codes.reshape(-1, 2)
        first, second = (1, 0) if self.nf4 else (0, 1)
        packed = (pairs[:, first] | pairs[:, second] << 4)[: self._filled // 2].reshape(-1, self.block // 2)
        return {".codes": self._arranged(packed), ".scales": stored.scale.cpu().numpy()}

    def _arranged(self, packed: np.ndarray) -> np.ndarray:
        """`[blocks, block / 2]` as the operators want it."""
        return packed

    @property
    def _rows_apart(self) -> bool:
        """Whether each row has blocks of its own."""
        return self.shape[-1] % self.block == 0

    @property
    def _experts_apart(self) -> bool:
        """Whether each expert has blocks of its own."""
        return prod(self.apart[1:]) % self.block == 0

    def _scales(self, nodes: Nodes, name: str, at: str) -> str:
        """Of every block, float32 `[blocks]`; a group's scale is that of all its blocks."""
        scales = nodes.cast(f"{name}.scales", f"{at}/groups")
        if self.block == self.group:
            return scales
        scales = nodes.reshape(scales, f"{at}/apart", -1, 1)
        scales = nodes.add("Expand", [scales, nodes.integers(1, self.group // self.block)], f"{at}/each")
        scales = nodes.reshape(scales, f"{at}/list", -1)
        end = nodes.integers(self._filled // self.block)
        return nodes.add("Slice", [scales, nodes.integers(0), end], f"{at}/scales")

    def value(self, nodes: Nodes, name: str) -> None:
        flat = self._looked_up(nodes, f"{name}.codes", self._scales(nodes, name, name), name)  # [blocks, block]
        if self._filled != prod(self.shape):
            flat = nodes.reshape(flat, f"{name}/list", -1)
            flat = nodes.add("Slice", [flat, nodes.integers(0), nodes.integers(prod(self.shape))], f"{name}/cut")
        nodes.reshape(flat, name, *self.shape)

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        if not self._rows_apart:
            return super().rows(nodes, name, index, output)
        self._gathered(nodes, name, index, output, self.shape[0], self.shape[-1])
        return False

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        if not self._experts_apart:
            return super().matrices(nodes, name, chosen, output)
        self._gathered(nodes, name, chosen, output, *self.apart)
        return False

    def _gathered(self, nodes: Nodes, name: str, index: str, output: str, count: int, *shape: int) -> None:
        """Of `count` parts of this shape, those that `index [...]` names: `[..., *shape]`."""
        codes = nodes.reshape(f"{name}.codes", f"{output}/parts", count, -1, self.block // self.per_byte)
        scales = nodes.reshape(self._scales(nodes, name, output), f"{output}/part_scales", count, -1)
        codes = nodes.add("Gather", [codes, index], f"{output}/codes", axis=0)
        scales = nodes.add("Gather", [scales, index], f"{output}/chosen", axis=0)
        nodes.to_parts(self._looked_up(nodes, codes, scales, output), index, output, *shape)

    def _looked_up(self, nodes: Nodes, codes: str, scales: str, at: str) -> str:
        """Values `[blocks, block]` of codes and scales of any arrangement."""
        index = nodes.cast(codes, f"{at}/index", "INT32")
        table = nodes.constant("codes/nf4" if self.nf4 else "codes/integers", _pairs(self.nf4))
        units = nodes.add("Gather", [table, index], f"{at}/pairs", axis=0)  # [..., block / 2, 2]
        units = nodes.reshape(units, f"{at}/units", -1, self.block)
        return nodes.add("Mul", [units, nodes.reshape(scales, f"{at}/factors", -1, 1)], f"{at}/blocks")


class Bytes(Codes):
    """Integers of five and six bits, a byte each, with a float16 scale a group.

    Not multiplied by `MatMulNBits` of 8 bits, as little as those of `Integers`.
    """

    word = "int8 · scale of a group"
    per_byte = 1

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, GroupedTensor)
        return {".codes": _integers(stored), ".scales": stored.scale.cpu().numpy()}

    def _looked_up(self, nodes: Nodes, codes: str, scales: str, at: str) -> str:
        units = nodes.reshape(nodes.cast(codes, f"{at}/integers"), f"{at}/units", -1, self.block)
        return nodes.add("Mul", [units, nodes.reshape(scales, f"{at}/factors", -1, 1)], f"{at}/blocks")


class Blocks(Codes):
    """Integers of four bits that `MatMulNBits` multiplies with; a row has blocks of its own."""

    word = "MatMulNBits"

    def _arranged(self, packed: np.ndarray) -> np.ndarray:
        return packed.reshape(self.shape[0], -1, self.block // 2)

    def product(self, nodes: Nodes, name: str, x: str, output: str) -> bool:
        n, k = self.shape
        scales = nodes.reshape(self._scales(nodes, name, output), f"{output}/factors", n, -1)
        nodes.add("MatMulNBits", [x, f"{name}.codes", scales], output, K=k, N=n, bits=4, block_size=self.block)
        return False


class NormalFloats(Codes):
    """NormalFloat codes that `MatMulBnb4` multiplies with, of rows of any length."""

    word = "MatMulBnb4"

    def _arranged(self, packed: np.ndarray) -> np.ndarray:
        return packed.reshape(-1)

    def product(self, nodes: Nodes, name: str, x: str, output: str) -> bool:
        n, k = self.shape
        scales = self._scales(nodes, name, output)
        nodes.add("MatMulBnb4", [x, f"{name}.codes", scales], output, K=k, N=n, block_size=self.block, quant_type=1)
        return False


def _codes(stored: GroupedTensor) -> np.ndarray:
    """Codes as they are, int64 `[g, values]`."""
    return unpack_reference(stored.q.cpu(), stored.book.bits).numpy()


def _integers(stored: GroupedTensor) -> np.ndarray:
    """What codes of integers stand for, before the scale: int8 `[g, values]`."""
    integers: np.ndarray = np.array(stored.book.values, dtype=np.int8)[_codes(stored)]
    return integers


def _pairs(nf4: bool) -> np.ndarray:
    """The values of the two codes in a byte: float32 `[256, 2]`."""
    byte = np.arange(256)
    low, high = byte & 15, byte >> 4
    if nf4:
        return np.array(NF4_BOOK.values, dtype=np.float32)[np.stack((high, low), axis=1)]
    return (np.stack((low, high), axis=1) - 8).astype(np.float32)


Kind = torch.dtype | tuple[CodeBook, int]
"""How values are stored: float32, float16, int8, or codes of a book in groups of some size."""


def kind_of(precision: str) -> Kind | None:
    """How a precision stores weights; None where the file cannot."""
    found = get_precision(precision)
    if isinstance(found, Grouped):
        return (found.book, found.group) if found.book in (*INTEGER_BOOKS, NF4_BOOK) else None
    if isinstance(found, Float16):
        return torch.float16
    return torch.int8 if isinstance(found, Int8) else None


def stored_kind(stored: Stored) -> Kind:
    """How a tensor is stored."""
    if isinstance(stored, GroupedTensor):
        return stored.book, stored.group
    if isinstance(stored, Int8Tensor):
        return torch.int8
    assert isinstance(stored, FloatTensor)
    return stored.value.dtype


def layout_of(parameter: Parameter, kind: Kind) -> Layout:
    """How a tensor is held that is stored in this way."""
    shape, form = parameter.shape, parameter.form
    experts = form.count if isinstance(form, ExpertsForm) else None
    if kind == torch.float32:
        return Single(shape, experts)
    if kind == torch.float16 or parameter.role == "bias":
        return Half(shape, experts)
    multiplies = isinstance(form, LinearForm) or (isinstance(form, EmbeddingForm) and form.tied)
    if kind == torch.int8:
        return Integers(shape, experts, vector=parameter.role == "vector")
    assert isinstance(kind, tuple)
    book, group = kind
    if book == NF4_BOOK:
        return (NormalFloats if multiplies else Codes)(shape, experts, group, nf4=True, block=group)
    if book.bits > 4:
        return Bytes(shape, experts, group, block=group)
    if multiplies and shape[1] % SMALLEST_BLOCK == 0:
        return Blocks(shape, experts, group, block=gcd(shape[1], group))
    return Codes(shape, experts, group, block=group)
