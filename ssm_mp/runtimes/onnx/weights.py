"""How the file holds each tensor: its arrays, exactly our codes and scales, and the nodes that compute with them.

A tensor that is a value has its dequantised float32 under its canonical name, so that what is made of it needs to know
nothing more. A matrix may stay packed: `MatMulNBits` and `MatMulBnb4` multiply with it, rows of tables and chosen
experts are dequantised alone.

Dimensions: `n` rows, `k` values in a row, `g` groups of 64 values, `X` experts, `c` chosen ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch

from ssm_mp.modules.embedding import EmbeddingForm, PositionForm
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.precisions.float16 import Float16
from ssm_mp.precisions.grouped import INT3_BOOK, INT4_BOOK, NF4_BOOK, Grouped, GroupedTensor
from ssm_mp.precisions.groups import GROUP, CodeBook, unpack_reference
from ssm_mp.precisions.int8 import Int8, Int8Tensor
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored

SMALL_BLOCK = 32
"""What `MatMulNBits` takes where rows are no multiple of our groups: each scale is then there twice."""
CONTRIB = "com.microsoft"
"""Operators that only ONNX Runtime has."""


class Nodes:
    """Nodes in order, and the constants that they need."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """One node, named as its output."""
        from onnx import helper

        domain = CONTRIB if operator.startswith("MatMul") and operator != "MatMul" else ""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant; the same name always means the same value."""
        self.constants.setdefault(name, value)
        return name

    def integers(self, *values: int) -> str:
        """A list of integers, such as a shape."""
        return self.constant(f"integers/{'x'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def cast(self, name: str, output: str, to: str = "FLOAT") -> str:
        from onnx import TensorProto

        return self.add("Cast", [name], output, to=getattr(TensorProto, to))

    def reshape(self, name: str, output: str, *shape: int) -> str:
        return self.add("Reshape", [name, self.integers(*shape)], output)


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
    """int8 with a float16 scale a row, by `DequantizeLinear`; a vector has one scale."""

    vector: bool = False
    word = "int8 · DequantizeLinear"

    @property
    def bytes(self) -> int:
        return prod(self.shape) + 2 * (1 if self.vector else self.shape[0])

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, Int8Tensor)
        scale = stored.scale.cpu().numpy().reshape(() if self.vector else self.apart[: 1 if self.experts is None else 2])
        return {".int8": stored.q.cpu().numpy().reshape(self.apart), ".scale": scale}

    def value(self, nodes: Nodes, name: str) -> None:
        q, scale = f"{name}.int8", f"{name}.scale"
        if self.experts is not None:
            q = nodes.reshape(q, f"{name}/joined", *self.shape)
            scale = nodes.reshape(scale, f"{name}/scales", -1)
        scale = nodes.cast(scale, f"{name}/scale")
        nodes.add("DequantizeLinear", [q, scale], name, axis=0)

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        """Of few rows, the integers and their scales are gathered first."""
        width = self.shape[-1]
        flat = nodes.reshape(index, f"{output}/flat", -1)
        q = nodes.add("Gather", [f"{name}.int8", flat], f"{output}/int8", axis=0)  # [rows, k]
        half = nodes.add("Gather", [f"{name}.scale", flat], f"{output}/float16", axis=0)
        found = nodes.add("DequantizeLinear", [q, nodes.cast(half, f"{output}/scale")], f"{output}/rows", axis=0)
        size = nodes.add("Concat", [nodes.add("Shape", [index], f"{output}/shape"), nodes.integers(width)],
                         f"{output}/size", axis=0)  # fmt: skip
        nodes.add("Reshape", [found, size], output)
        return False

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        _, n, k = self.apart
        q = nodes.add("Gather", [f"{name}.int8", chosen], f"{output}/int8", axis=0)  # [m, c, n, k]
        half = nodes.add("Gather", [f"{name}.scale", chosen], f"{output}/float16", axis=0)  # [m, c, n]
        scale = nodes.reshape(nodes.cast(half, f"{output}/scale"), f"{output}/scales", -1)
        found = nodes.add("DequantizeLinear", [nodes.reshape(q, f"{output}/flat", -1, k), scale], f"{output}/rows", axis=0)
        size = nodes.add("Concat", [nodes.add("Shape", [chosen], f"{output}/shape"), nodes.integers(n, k)],
                         f"{output}/size", axis=0)  # fmt: skip
        nodes.add("Reshape", [found, size], output)
        return False


@dataclass(frozen=True)
class Codes(Layout):
    """Four bits a value with a float16 scale a block of values, in the order of the tensor.

    What is not multiplied by an operator that reads codes is dequantised by a table, two codes at a time.
    nf4: codes of `MatMulBnb4`, the first in the high bits; else a value and 8, the first in the low bits.
    block: values that share a scale here; 64, or 32 with each scale twice.
    """

    nf4: bool = False
    block: int = GROUP
    word = "4 bits · table"

    @property
    def blocks(self) -> int:
        """How many there are; the last one may be filled up."""
        return -(-prod(self.shape) // self.block)

    @property
    def bytes(self) -> int:
        return self.blocks * (self.block // 2 + 2)

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        assert isinstance(stored, GroupedTensor)
        codes = unpack_reference(stored.q.cpu(), stored.book.bits).to(torch.uint8).numpy()  # [g, 64]
        if not self.nf4:
            codes = codes + np.uint8(8 + int(stored.book.values[0]))
        pairs = codes.reshape(-1, 2)
        first, second = (1, 0) if self.nf4 else (0, 1)
        packed = (pairs[:, first] | pairs[:, second] << 4).reshape(-1, self.block // 2)[: self.blocks]
        scale = np.repeat(stored.scale.cpu().numpy(), GROUP // self.block)[: self.blocks]
        return {".codes": self._arranged(packed), ".scales": self._arranged(scale)}

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        """`[blocks, …]` as the operators want it."""
        return array.reshape(self.experts, -1, *array.shape[1:]) if self._experts_apart else array

    @property
    def _experts_apart(self) -> bool:
        """Whether each expert has blocks of its own."""
        return self.experts is not None and prod(self.apart[1:]) % self.block == 0

    @property
    def _rows_apart(self) -> bool:
        """Whether each row has blocks of its own."""
        return self.shape[-1] % self.block == 0

    def value(self, nodes: Nodes, name: str) -> None:
        flat = self._looked_up(nodes, f"{name}.codes", f"{name}.scales", name)  # [blocks, block]
        if self.blocks * self.block != prod(self.shape):
            flat = nodes.reshape(flat, f"{name}/list", -1)
            flat = nodes.add("Slice", [flat, nodes.integers(0), nodes.integers(prod(self.shape))], f"{name}/cut")
        nodes.reshape(flat, name, *self.shape)

    def rows(self, nodes: Nodes, name: str, index: str, output: str) -> bool:
        if not self._rows_apart:
            return super().rows(nodes, name, index, output)
        self._gathered(nodes, name, index, output, self.shape[0], (self.shape[-1],))
        return False

    def matrices(self, nodes: Nodes, name: str, chosen: str, output: str) -> bool:
        if not self._experts_apart:
            return super().matrices(nodes, name, chosen, output)
        self._gathered(nodes, name, chosen, output, self.apart[0], self.apart[1:])
        return False

    def _gathered(
        self, nodes: Nodes, name: str, index: str, output: str, count: int, shape: tuple[int, ...]
    ) -> None:
        """Of `count` parts of this shape, those of `index [...]`: `[..., *shape]`."""
        per_part = self.blocks // count
        codes = nodes.reshape(f"{name}.codes", f"{output}/parts", count, per_part, self.block // 2)
        scales = nodes.reshape(f"{name}.scales", f"{output}/scales", count, per_part)
        codes = nodes.add("Gather", [codes, index], f"{output}/codes", axis=0)
        scales = nodes.add("Gather", [scales, index], f"{output}/chosen", axis=0)
        found = self._looked_up(nodes, codes, scales, output)
        size = nodes.add("Concat", [nodes.add("Shape", [index], f"{output}/shape"), nodes.integers(*shape)],
                         f"{output}/size", axis=0)  # fmt: skip
        nodes.add("Reshape", [found, size], output)

    def _looked_up(self, nodes: Nodes, codes: str, scales: str, at: str) -> str:
        """Values `[blocks, block]` of codes and scales of any arrangement."""
        index = nodes.cast(codes, f"{at}/index", "INT32")
        table = nodes.constant("codes/nf4" if self.nf4 else "codes/integers", _pairs(self.nf4))
        units = nodes.add("Gather", [table, index], f"{at}/pairs", axis=0)  # [..., block / 2, 2]
        units = nodes.reshape(units, f"{at}/units", -1, self.block)
        factors = nodes.reshape(nodes.cast(scales, f"{at}/float"), f"{at}/factors", -1, 1)
        return nodes.add("Mul", [units, factors], f"{at}/blocks")


class Blocks(Codes):
    """Integers of four bits that `MatMulNBits` multiplies with; a row has blocks of its own."""

    word = "MatMulNBits"

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.shape[0], -1, *array.shape[1:])

    def product(self, nodes: Nodes, name: str, x: str, output: str) -> bool:
        n, k = self.shape
        scales = nodes.cast(f"{name}.scales", f"{output}/factors")
        nodes.add("MatMulNBits", [x, f"{name}.codes", scales], output, K=k, N=n, bits=4, block_size=self.block)
        return False


class NormalFloats(Codes):
    """NormalFloat codes that `MatMulBnb4` multiplies with, of rows of any length."""

    word = "MatMulBnb4"

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1)

    def product(self, nodes: Nodes, name: str, x: str, output: str) -> bool:
        n, k = self.shape
        scales = nodes.cast(f"{name}.scales", f"{output}/factors")
        nodes.add("MatMulBnb4", [x, f"{name}.codes", scales], output, K=k, N=n, block_size=self.block, quant_type=1)
        return False


def _pairs(nf4: bool) -> np.ndarray:
    """The values of the two codes in a byte: float32 `[256, 2]`."""
    byte = np.arange(256)
    low, high = byte & 15, byte >> 4
    if nf4:
        return np.array(NF4_BOOK.values, dtype=np.float32)[np.stack((high, low), axis=1)]
    return (np.stack((low, high), axis=1) - 8).astype(np.float32)


Kind = torch.dtype | CodeBook
"""How values are stored: float32, float16, int8, or codes of a book."""


def kind_of(precision: str) -> Kind | None:
    """How a precision stores weights; None where the file cannot."""
    found = get_precision(precision)
    if isinstance(found, Grouped):
        return found.book if found.book in (INT4_BOOK, INT3_BOOK, NF4_BOOK) else None
    if isinstance(found, Float16):
        return torch.float16
    return torch.int8 if isinstance(found, Int8) else None


def stored_kind(stored: Stored) -> Kind:
    """How a tensor is stored."""
    if isinstance(stored, GroupedTensor):
        return stored.book
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
    if kind == torch.int8:
        return Integers(shape, experts, vector=parameter.role == "vector")
    assert isinstance(kind, CodeBook)
    multiplies = isinstance(form, LinearForm) or (isinstance(form, EmbeddingForm) and form.tied)
    if kind == NF4_BOOK:
        return NormalFloats(shape, nf4=True) if multiplies else Codes(shape, experts, nf4=True)
    if multiplies and shape[1] % SMALL_BLOCK == 0:
        return Blocks(shape, block=GROUP if shape[1] % GROUP == 0 else SMALL_BLOCK)
    return Codes(shape, experts)

