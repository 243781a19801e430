"""Precisions that no file of the package knows, of every way to make one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.groups import CodeBook
from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.quantize import dequantize_rows, integer_product, quantize_rows, weight_scales
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import ArraySpec, FloatTensor, IntegerTensor, Role, Stored
from ssm_mp.scheme import ScaleRule
from tests.ssm_mp.precisions.fp8 import FP8


class Brain(Precision):
    """bfloat16, in the package's own class of floats but of a type that the kernels do not know."""

    name = "bf16"
    bits = 16
    quantizes_inputs = False

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        return {"": ArraySpec(shape, torch.bfloat16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        held = tensor.bfloat16()
        if not bool(held.isfinite().all()):
            raise InfeasibleError(f"its largest value, {tensor.abs().max().item():.4g}, is above bfloat16's")
        return FloatTensor(held)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return FloatTensor(arrays[""])


class Offset(IntegerTensor):
    """Integers of 6 bits, a byte each, held above zero: with a product of integers of its own."""

    q: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    @property
    def _integers(self) -> Tensor:
        return (self.q.short() - 32).to(torch.int8)

    def product(self, a: Tensor) -> Tensor:
        return integer_product(self._integers, a).t()  # as it happens to lie in memory

    def tensor(self) -> Tensor:
        return dequantize_rows(self._integers.reshape(self.scale.shape[0], -1), self.scale).reshape(self.q.shape)

    def rows(self, index: Tensor) -> Tensor:
        return self._integers[index].float() * self.scale[index].float()[..., None]

    def arrays(self) -> dict[str, Tensor]:
        return {"q": self.q, "scale": self.scale}


class Offset6(Precision):
    name = "offset6"
    bits = 6
    quantizes_inputs = True

    def _arrays(self, shape: tuple[int, ...], role: Role) -> dict[str, ArraySpec]:
        scales = shape[0] if role == "weight" else 1
        return {"q": ArraySpec(shape, torch.uint8), "scale": ArraySpec((scales,), torch.float16)}

    def _store(self, tensor: Tensor, role: Role, rule: ScaleRule) -> Stored:
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        scale = weight_scales(rows, rule, limit=31)
        q = (quantize_rows(rows, scale, limit=31).short() + 32).to(torch.uint8)
        return Offset(q.reshape(tensor.shape), scale)

    def _restore(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        return Offset(arrays["q"], arrays["scale"])


BF16 = Brain()
OFFSET6 = Offset6()
BOOK5 = Grouped("book5", CodeBook(5, tuple(float(value) for value in range(-16, 16))))
BOOK2 = Grouped("book2", CodeBook(2, (-1.0, 0.0, 1.0)), group=8)

OUTSIDE: dict[str, Precision] = {precision.name: precision for precision in (BF16, FP8, OFFSET6, BOOK5, BOOK2)}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add them to the registry for one test: one line each, the widest first."""
    here, homes = "tests.ssm_mp.precisions", dict(PRECISIONS.homes)
    lines = {
        "fp16": homes.pop("fp16"),
        "bf16": f"{here}.outside:BF16",
        "int8": homes.pop("int8"),
        "fp8": f"{here}.fp8:FP8",
        "offset6": f"{here}.outside:OFFSET6",
        "book5": f"{here}.outside:BOOK5",
        **homes,
        "book2": f"{here}.outside:BOOK2",
    }
    monkeypatch.setattr(PRECISIONS, "homes", lines)
