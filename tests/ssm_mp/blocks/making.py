"""Modules of blocks out of random tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.blocks.block import Block, Mixing, Parts, Scan
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Form, Parameter
from ssm_mp.precisions.stored import FloatTensor, Stored

AT = "layers.0.mixer"


def tensors_of(block: Block, seed: int, at: str = AT) -> dict[str, Tensor]:
    """Random float32 tensors by parameter name, of such sizes that outputs are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    return {parameter.name: _tensor(parameter, generator) for parameter in block.parameters(at, 0)}


def mixing_of(block: Block, tensors: Mapping[str, Tensor], at: str = AT, scan: Scan | None = None) -> Mixing:
    """The block's module, each of its components in FP32."""
    forms: dict[str, Form] = {}
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    for parameter in block.parameters(at, 0):
        forms[parameter.component] = parameter.form
        stored[parameter.component][parameter.leaf] = FloatTensor(tensors[parameter.name])
    modules = {name: form.module(stored[name], None) for name, form in forms.items()}
    return block.module(Parts(modules, f"{at}.", dict(block.names)), scan)


def _tensor(parameter: Parameter, generator: torch.Generator) -> Tensor:
    """By what the tensor is: a weight, a norm's factors, or a value of a state space."""
    shape = parameter.shape
    normal = torch.randn(shape, generator=generator)
    if parameter.kind == "A_log":
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if parameter.kind == "dt_bias":  # steps from 0.001 to 0.1, the way that models begin
        step = torch.exp(math.log(1e-3) + math.log(1e2) * torch.rand(shape, generator=generator))
        return step + torch.log(-torch.expm1(-step))
    if isinstance(parameter.form, NormForm) and parameter.leaf == "weight":
        return 0.1 * normal + (0 if parameter.form.one_plus else 1)
    if parameter.kind == "D":
        return 1 + 0.1 * normal
    if len(shape) > 1:
        return normal / math.sqrt(math.prod(shape[1:]))
    return 0.1 * normal
