"""Random weights of every kind that the kernels know, and linear layers of them."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.modules.inputs import DynamicInput, StaticInput
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ActivationScheme, ScaleRule

KINDS = ("fp32", "fp16", "int8", "nf4", "nf4g32", "int4", "int4g128", "nf3", "int3", "nf3g128", "nf2", "nf2g128")
"""Kinds of weights that the kernels multiply many rows with."""


def weights(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Random weights, no row of them so small that its scale would be none."""
    values = torch.randn(n, k, generator=g)
    return torch.where(values.abs() < 1e-3, 1e-3, values)


def weight_of(kind: str, n: int, k: int, g: torch.Generator) -> Stored:
    """A random weight of one of the kinds."""
    values = weights(n, k, g)
    return FloatTensor(values) if kind == "fp32" else PRECISIONS[kind].store(values, "weight", ScaleRule())


def known(matrix: Matrix | None) -> Matrix:
    """That of a weight which the kernels know."""
    assert matrix is not None
    return matrix


def integer_linear(n: int, k: int, scheme: ActivationScheme, bias: bool, g: torch.Generator) -> Linear:
    """A linear layer whose product is one of integers; skips where this CPU's kernels take no many inputs."""
    weight = PRECISIONS["int8"].store(weights(n, k, g), "weight", ScaleRule())
    held = FloatTensor(torch.randn(n, generator=g)) if bias else None
    inputs = DynamicInput() if scheme == "dynamic" else StaticInput(torch.tensor([0.02], dtype=torch.float16))
    layer = Linear(weight, held, inputs)
    if not known(layer.matrix()).takes_many:
        pytest.skip("this CPU has no instruction for it")
    return layer


def float16_linear(n: int, k: int, g: torch.Generator, bias: bool = False) -> Linear:
    """A linear layer of float16 weights of many magnitudes; skips where this CPU's kernels take no many inputs."""
    weight = torch.randn(n, k, generator=g) * 10 ** torch.randint(-7, 3, (n, 1), generator=g)
    layer = Linear(FloatTensor(weight.half()), FloatTensor(torch.randn(n, generator=g)) if bias else None)
    if not known(layer.matrix()).takes_many:
        pytest.skip("this CPU has no instruction for it")
    return layer
