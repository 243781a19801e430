"""Branches of a single block, at any precision, as compiled programs and module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ssm_mp.blocks.block import Block, State
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.short_conv import ShortConv
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

KNOWN = ("fp32", "fp16", "int8", "int8 static", "int8 dynamic", "nf4", "int3", "mixed")
"""Precisions that the kernels know, and how inputs of int8 are quantised; "mixed": another one for each component.
int6 is none."""
_MIXED = ("int8 dynamic", "fp16", "nf4", "int3", "int8", "int8 static", "fp32")
TOLERANCE, STEP, CHOICE = 1e-4, 2e-2, 0.5
"""Largest error over the largest value; where a quantised input is another; and where a token has another expert."""
Three = tuple[float, float, float]
PLAIN: Three = (1.0, 1.0, 1.0)
"""Multipliers of what enters a block and of what leaves it, and of what its branch adds."""
_STATIC_SCALE = 4 / 127
_NORM = NormForm(1e-5, "layer")


def branch_of(block: Block, precision: str = "fp32", *, seed: int = 1, multipliers: Three = PLAIN) -> Residual:
    """A branch of random tensors at one of the precisions in `KNOWN`, or at one that the kernels do not know."""
    tensors: dict[str, dict[str, Stored]] = defaultdict(dict)
    forms: dict[str, Form] = {}
    values, mixed = tensors_of(block, seed), cycle(_MIXED)
    chosen: dict[str, str] = defaultdict(lambda: next(mixed) if precision == "mixed" else precision)
    for parameter in block.parameters(AT, 0):
        value, (name, *_) = values[parameter.name], chosen[parameter.component].split()
        held = FloatTensor(value) if name == "fp32" else get_precision(name).store(value, parameter.role, ScaleRule())
        tensors[parameter.component][parameter.leaf], forms[parameter.component] = held, parameter.form
    modules = {
        component: form.module(tensors[component], _inputs(chosen[component]) if form.multiplies_inputs else None)
        for component, form in forms.items()
    }
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (FloatTensor(torch.randn(block.d_model, generator=generator)) for _ in range(2))
    layer, _, part = AT.rpartition(".")
    modules[f"{layer}.norm"] = _NORM.module({"weight": weight, "bias": bias}, None)
    before, after, residual = multipliers
    return Residual(Branch("norm", _NORM, (Part(part, block, before, after),), residual), modules, layer, {})


def _inputs(precision: str) -> InputQuantizer | None:
    if precision == "int8 static":
        return StaticInput(torch.tensor([_STATIC_SCALE], dtype=torch.float16))
    return DynamicInput() if precision == "int8 dynamic" else None


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


def by_modules(branch: Residual, x: Tensor, before: list[State] | None = None) -> tuple[Tensor, list[State]]:
    """What the program should give."""
    with patch.object(branch, "compiled", return_value=None):
        return branch.carry(x, before)


def edge_of(block: Block, precision: str) -> float:
    """Largest error of the few tokens of which something falls on the other side of an edge: an input of a step, or a
    token of the choice between experts."""
    if precision in ("fp32", "fp16"):
        return TOLERANCE
    if isinstance(block, Experts):
        return CHOICE
    return STEP if precision in ("int8 static", "int8 dynamic", "mixed") else TOLERANCE


def require_same_outputs(found: Tensor, expected: Tensor, edge: float = TOLERANCE) -> None:
    """Outputs `[b, l, d]` equal but for rounding; edge: as `edge_of` says."""
    largest = max(1.0, float(expected.abs().max()))
    off = (found - expected).abs().amax(dim=-1)  # [b, l]
    assert off.max() <= edge * largest
    assert (off > TOLERANCE * largest).sum() <= off.numel() // 50


def require_same(
    found: tuple[Tensor, list[State]], expected: tuple[Tensor, list[State]], edge: float = TOLERANCE
) -> None:
    """Outputs and states equal but for rounding."""
    (states,), (others,) = found[1], expected[1]
    for one, other in zip(states, others, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0  # a convolution of one tap carries nothing
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, largest))
    require_same_outputs(found[0], expected[0], edge)


def require_what_modules_give(
    block: Block, precision: str, shapes: Sequence[tuple[int, int]], *, many: bool = False, multipliers: Three = PLAIN
) -> None:
    """For so many sequences of so many tokens, from the beginning, and going on from states, which are left as they
    are."""
    branch, edge = branch_of(block, precision, multipliers=multipliers), edge_of(block, precision)
    program = compiled(branch, many=many)
    for batch, length in shapes:
        generator = torch.Generator().manual_seed(length)
        x, more = torch.randn(2, batch, length, block.d_model, generator=generator).unbind()
        with torch.inference_mode():
            expected = by_modules(branch, x)
            require_same(program(x, None), expected, edge)
            kept = [tensor.clone() for tensor in expected[1][0]]
            require_same(program(more, expected[1]), by_modules(branch, more, expected[1]), edge)
        assert all(torch.equal(one, other) for one, other in zip(kept, expected[1][0], strict=True))


def require_no_change_by_threads(
    block: Block, precision: str, shapes: Sequence[tuple[int, int]], *, many: bool = False
) -> None:
    """The very same numbers by three threads, and by more than there are sequences, as by one."""
    program, threads = compiled(branch_of(block, precision), many=many), torch.get_num_threads()
    for batch, length in shapes:
        x, found = torch.randn(batch, length, block.d_model), []
        try:
            for count in (1, 3, 8):
                torch.set_num_threads(count)
                with torch.inference_mode():
                    found.append(program(x, None))
        finally:
            torch.set_num_threads(threads)
        one, (states,) = found[0]
        for other, (others,) in found[1:]:
            assert torch.equal(one, other)
            assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


def require_own_sequence_spoilt(block: Block, precision: str, lengths: Sequence[int]) -> None:
    """By a token that is not finite: itself, all after it where a state is carried, nothing else."""
    program = compiled(branch_of(block, precision))
    for length in lengths:
        for bad in (torch.nan, torch.inf):
            _require_own_sequence_spoilt(program, torch.randn(3, length, block.d_model), bad)


def _require_own_sequence_spoilt(program: CompiledBranch, x: Tensor, bad: float) -> None:
    at = x.shape[1] // 2
    with torch.inference_mode():
        good, (states,) = program(x, None)
        x[1, at, 3] = bad
        spoilt, (left,) = program(x, None)
        assert not spoilt[1, at].isfinite().any()
        carried = any(state.numel() for state in states)  # a convolution of one tap carries nothing
        seen = slice(at, None if carried else at + 1)
        assert spoilt[1, seen].isnan().any(dim=-1).all()
        spoilt[1, seen] = good[1, seen]
    assert torch.equal(spoilt, good)
    for one, other in zip(states, left, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not carried or left[-1][1].isnan().any()


def model_of(block: Block, precision: str) -> LanguageModel:
    """A short convolution, which carries a state whatever the block does, and two layers of the block, at one
    precision, inputs of int8 quantised by the token."""
    first = Branch("norm", _NORM, (Part("conv", ShortConv(d_model=block.d_model, d_conv=3)),))
    branch = Branch("norm", _NORM, (Part("mixer", block, 1.1, 0.9),), 0.8)
    config = HybridConfig(
        word="mamba2", vocabulary=40, d_model=block.d_model, layers=((first,), (branch,), (branch,)), norm=_NORM,
        tied=True,
    )  # fmt: skip
    return converted(random_model(config), precision)


def converted(model: LanguageModel, precision: str) -> LanguageModel:
    """All of it at one precision, inputs of int8 quantised by the token."""
    if precision == "fp32":
        return model
    everywhere = PrecisionMap.uniform(precision.split(maxsplit=1)[0], find_components(model))
    return Converter(model, Scheme("dynamic")).convert(everywhere)


def require_steps_of_the_model(model: LanguageModel, edge: float = TOLERANCE) -> None:
    """Tokens decoded in compiled calls, after a few that were read, against the layers one after another."""
    vocabulary = model.config.vocabulary
    ids = torch.randint(0, vocabulary, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        current = model.carry(ids[:, :5])[1]
        decoder = CompiledDecoder.of(model, current, 5)
        assert decoder is not None
        for t in range(5, 9):
            hidden, current = model.carry(ids[:, t : t + 1], current, t)
            expected = model.head(hidden[:, -1])
            assert (decoder.step(ids[:, t]) - expected).abs().max() <= edge * expected.abs().max()
