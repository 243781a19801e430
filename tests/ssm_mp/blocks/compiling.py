"""Branches of a single block, at any precision, as compiled programs and module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ssm_mp.blocks.block import Block, State
from ssm_mp.components import find_components
from ssm_mp.config import Branch, Part
from ssm_mp.conversion.convert import Converter
from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.families.hybrid import HybridConfig
from ssm_mp.model import LanguageModel, Residual
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.norm import Norm, NormForm
from ssm_mp.modules.parameter import Form
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.programs.branch import CompiledBranch
from ssm_mp.programs.program import NotCompiledError, Program
from ssm_mp.scheme import ScaleRule, Scheme
from tests.ssm_mp.blocks.making import AT, tensors_of
from tests.tiny import random_model

KNOWN = ("fp32", "fp16", "int8", "int8 static", "int8 dynamic", "nf4", "int3")
"""Precisions that the kernels know, and how their inputs are quantised; int6 is none."""
QUANTISED_INPUTS = ("int8 static", "int8 dynamic")
TOLERANCE, STEP = 1e-4, 2e-2
"""Largest error over the largest value, and where a quantised input is another."""
_STATIC_SCALE = 4 / 127
_NORM = NormForm(1e-5, "layer")


def branch_of(block: Block, precision: str = "fp32", seed: int = 1) -> Residual:
    """A branch of random tensors, all at one precision. "int8 static": its inputs too, by one scale."""
    name, _, scheme = precision.partition(" ")
    tensors: dict[str, dict[str, Stored]] = defaultdict(dict)
    forms: dict[str, Form] = {}
    values = tensors_of(block, seed)
    for parameter in block.parameters(AT, 0):
        value = values[parameter.name]
        held = FloatTensor(value) if name == "fp32" else get_precision(name).store(value, parameter.role, ScaleRule())
        tensors[parameter.component][parameter.leaf], forms[parameter.component] = held, parameter.form
    modules = {
        component: form.module(tensors[component], _inputs(scheme) if form.multiplies_inputs else None)
        for component, form in forms.items()
    }
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (FloatTensor(torch.randn(block.d_model, generator=generator)) for _ in range(2))
    layer, _, part = AT.rpartition(".")
    modules[f"{layer}.norm"] = _NORM.module({"weight": weight, "bias": bias}, None)
    return Residual(Branch("norm", _NORM, (Part(part, block),)), modules, layer, {})


def _inputs(scheme: str) -> InputQuantizer | None:
    if scheme == "static":
        return StaticInput(torch.tensor([_STATIC_SCALE], dtype=torch.float16))
    return DynamicInput() if scheme == "dynamic" else None


def compiled(branch: Residual, *, many: bool = False) -> CompiledBranch:
    """The branch as a program, for few rows or for many; skips where this CPU has no such products."""
    assert isinstance(branch.norm, Norm)
    (width,) = branch.norm.weight.shape
    program = Program(width, many=many)
    try:
        counts = branch.emit(program)
    except NotCompiledError as error:
        if many:
            pytest.skip(str(error))
        raise
    program.close()
    return CompiledBranch(program, counts)


def by_modules(branch: Residual, x: Tensor, before: list[State] | None) -> tuple[Tensor, list[State]]:
    """What the program should give: its only block's `forward`."""
    (mixing,) = branch.mixings
    y, state = mixing(branch.norm(x), None if before is None else before[0])
    return x + y, [state]


def require_same(
    found: tuple[Tensor, list[State]], expected: tuple[Tensor, list[State]], *, steps: bool = False
) -> None:
    """Outputs and states equal but for rounding. steps: of inputs that are quantised; where one falls on the other side
    of a step, which few do, its token's outputs are off by some of that."""
    (states,), (others,) = found[1], expected[1]
    for one, other in zip(states, others, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0  # a convolution of one tap carries nothing
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, largest))
    largest = float(expected[0].abs().max())
    off = (found[0] - expected[0]).abs().amax(dim=-1)  # [b, l]
    assert off.max() <= (STEP if steps else TOLERANCE) * largest
    assert (off > TOLERANCE * largest).sum() <= off.numel() // 50


def require_what_modules_give(
    block: Block, precision: str, shapes: Sequence[tuple[int, int]], *, many: bool = False
) -> None:
    """For so many sequences of so many tokens, from the beginning, and going on from states, which are left as they
    are."""
    branch = branch_of(block, precision)
    program, steps = compiled(branch, many=many), precision in QUANTISED_INPUTS
    for batch, length in shapes:
        generator = torch.Generator().manual_seed(length)
        x, more = torch.randn(2, batch, length, block.d_model, generator=generator).unbind()
        with torch.inference_mode():
            expected = by_modules(branch, x, None)
            require_same(program(x, None), expected, steps=steps)
            kept = [tensor.clone() for tensor in expected[1][0]]
            require_same(program(more, expected[1]), by_modules(branch, more, expected[1]), steps=steps)
        assert all(torch.equal(one, other) for one, other in zip(kept, expected[1][0], strict=True))


def require_no_change_by_threads(program: CompiledBranch, batch: int, length: int, width: int) -> None:
    """The very same numbers by two threads as by one."""
    x, threads = torch.randn(batch, length, width), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.inference_mode():
                found.append(program(x, None))
    finally:
        torch.set_num_threads(threads)
    (one, (states,)), (two, (others,)) = found
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


def require_own_sequence_spoilt(program: CompiledBranch, length: int, width: int, bad: float) -> None:
    """By a token that is not finite, from there on, and no other."""
    x, at = torch.randn(3, length, width), length // 2
    with torch.inference_mode():
        good, (states,) = program(x, None)
        x[1, at, 3] = bad
        spoilt, (left,) = program(x, None)
    assert torch.equal(spoilt[[0, 2]], good[[0, 2]])
    assert torch.equal(spoilt[1, :at], good[1, :at])
    assert spoilt[1, at:].isnan().any(dim=-1).all()
    for one, other in zip(states, left, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert left[1][1].isnan().any()


def model_of(block: Block, precision: str) -> LanguageModel:
    """Two layers of the block, at one precision, inputs of int8 quantised by the token."""
    branch = Branch("norm", _NORM, (Part("mixer", block, 1.1, 0.9),), 0.8)
    config = HybridConfig(
        word="mamba2", vocabulary=40, d_model=block.d_model, layers=((branch,),) * 2, norm=_NORM, tied=True
    )
    model = random_model(config)
    if precision == "fp32":
        return model
    return Converter(model, Scheme("dynamic")).convert(PrecisionMap.uniform(precision, find_components(model)))


def require_steps_of_the_model(block: Block, precision: str, batch: int = 3) -> None:
    """Tokens decoded in compiled calls, after a few that were read, against the layers one after another."""
    model, tolerance = model_of(block, precision), STEP if precision == "int8" else TOLERANCE
    ids = torch.randint(0, 40, (batch, 12), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        current = model.carry(ids[:, :5])[1]
        decoder = CompiledDecoder.of(model, current, 5)
        assert decoder is not None
        for t in range(5, 12):
            hidden, current = model.carry(ids[:, t : t + 1], current, t)
            expected = model.head(hidden[:, -1])
            assert (decoder.step(ids[:, t]) - expected).abs().max() <= tolerance * expected.abs().max()
