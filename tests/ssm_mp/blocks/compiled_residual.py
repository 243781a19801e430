"""A residual branch of one block, its weights in some precision, module by module and as the kernels compute it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor

from ssm_mp.blocks.block import Block
from ssm_mp.config import Branch, Part
from ssm_mp.model import Residual
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.norm import Norm, NormForm
from ssm_mp.modules.parameter import Form
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.programs.branch import CompiledBranch
from ssm_mp.programs.program import Program
from ssm_mp.scheme import ScaleRule
from tests.ssm_mp.blocks.making import AT, tensors_of

Weights = Literal["fp32", "fp16", "int8", "int8 dynamic", "int8 static", "nf4", "int3", "mixed"]
WEIGHTS: Sequence[Weights] = ("fp32", "fp16", "int8 dynamic", "int8 static", "nf4", "mixed")
"""Precisions of weights, and how the inputs of int8 ones are quantised; `mixed`: another one for each weight."""
_MIXED: Sequence[Weights] = ("int8 dynamic", "fp16", "nf4", "int3", "int8", "int8 static", "fp32")
_STATIC = torch.tensor([0.03]).half()


def residual_of(
    block: Block,
    weights: Weights = "fp32",
    seed: int = 1,
    before: float = 1.0,
    after: float = 1.0,
    residual: float = 1.0,
) -> Residual:
    """A random branch; what it adds is of order 1."""
    layer, _, part = AT.rpartition(".")
    norm = NormForm(1e-5)
    tensors = tensors_of(block, seed) | {f"{layer}.norm.weight": torch.linspace(0.5, 1.5, block.d_model)}
    forms: dict[str, Form] = {}
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    inputs: dict[str, InputQuantizer | None] = {}
    parameters = [*norm.parameters(f"{layer}.norm", 0, block.d_model), *block.parameters(AT, 0)]
    for i, parameter in enumerate(parameters):
        multiplies = parameter.form.multiplies_inputs and parameter.role == "weight"
        said = _MIXED[i % len(_MIXED)] if weights == "mixed" else weights
        precision, _, how = (said if multiplies else "fp32").partition(" ")
        tensor, component = tensors[parameter.name], parameter.component
        forms[component] = parameter.form
        if precision == "fp32":
            stored[component][parameter.leaf] = FloatTensor(tensor)
        else:
            stored[component][parameter.leaf] = get_precision(precision).store(tensor, parameter.role, ScaleRule())
        if multiplies:
            inputs[component] = {"": None, "dynamic": DynamicInput(), "static": StaticInput(_STATIC)}[how]
    modules = {name: form.module(stored[name], inputs.get(name)) for name, form in forms.items()}
    return Residual(Branch("norm", norm, (Part(part, block, before, after),), residual), modules, layer, {})


def compiled(branch: Residual) -> CompiledBranch:
    """The branch as calls of the kernels that take any number of rows on every CPU."""
    assert isinstance(branch.norm, Norm)
    program = Program(branch.norm.weight.shape[0], many=False)
    counts = branch.emit(program)
    program.close()
    return CompiledBranch(program, counts)


def by_module(branch: Residual, x: Tensor) -> Tensor:
    """The same where nothing is compiled, `x [b, l, d]` → `[b, l, d]`."""
    with patch.object(branch, "compiled", return_value=None):
        return branch.carry(x, None)[0]


def assert_near(found: Tensor, expected: Tensor, weights: Weights = "fp32") -> None:
    """`[b, l, d]` equal to float32 rounding; where inputs are rounded, one on the edge may fall to the other side,
    and a token's expert may be another one, which moves a token in a hundred by a step of int8."""
    scale = max(1.0, float(expected.abs().max()))
    error = (found - expected).abs().amax(dim=-1) / scale
    if weights in ("int8 dynamic", "int8 static", "nf4", "mixed"):
        assert float(error.max()) < (0.5 if weights == "nf4" else 2e-2)
        error = error.flatten().sort().values[: -(-error.numel() * 99 // 100)]
    assert float(error.max()) < 1e-4
