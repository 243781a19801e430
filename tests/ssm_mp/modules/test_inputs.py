"""Inputs rounded as llama.cpp rounds them: to the same numbers, once, before everything else that a product does."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.conversion.convert import Converter
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.families.hybrid import HybridConfig
from ssm_mp.model import build
from ssm_mp.modules.experts import ExpertsLinear
from ssm_mp.modules.inputs import BLOCK, BlockInput, HalfInput, Multiplied, input_quantizer, rounded
from ssm_mp.modules.linear import Linear
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import get_precision
from ssm_mp.scheme import ScaleRule, Scheme
from tests.families.models import checkpoint_of, windows_of
from tests.tiny import HUGGING_FACE, random_model, some_windows


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 4), st.floats(1e-4, 1e4))
def test_blocks_are_rounded_to_the_numbers_of_the_definition(seed: int, rows: int, blocks: int, scale: float) -> None:
    """Block by block, in numpy (ggml-quants.c, quantize_row_q8_0)."""
    x = normal(seed, rows, BLOCK * blocks) * scale
    found = BlockInput()(x).numpy()
    for row, theirs in zip(x.numpy(), found, strict=True):
        for block, their in zip(row.reshape(-1, BLOCK), theirs.reshape(-1, BLOCK), strict=True):
            d = np.abs(block).max() / np.float32(127)
            codes = np.rint(block * (np.float32(1) / d))
            np.testing.assert_array_equal(their, codes * np.float32(np.float16(d)))


def test_a_block_of_zeros_stays_zeros() -> None:
    x = torch.zeros(2, 64)
    x[1, 40] = 3.0
    found = BlockInput()(x)
    assert not found[0].any()
    assert not found[1, :32].any()
    assert found[1, 40] == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_product_is_that_of_its_rounded_inputs(precision: str, rows: int) -> None:
    weight = get_precision(precision).store(normal(0, 24, 64), "weight", ScaleRule())
    quantizer = input_quantizer("blocks", precision)
    assert quantizer is not None
    x = normal(1, rows, 64)
    expected = F.linear(rounded(quantizer, x), weight.tensor())
    linear = Linear(weight, None, quantizer)
    near = 1e-3 if precision == "int4" else 1e-5  # multiplied in fixed point on some CPUs
    torch.testing.assert_close(linear(x), expected, rtol=near, atol=near)
    torch.testing.assert_close(linear.projection()(x), expected, rtol=near, atol=near)
    torch.testing.assert_close(copy.deepcopy(linear)(x), expected, rtol=near, atol=near)
    assert not torch.allclose(linear(x), F.linear(x, weight.tensor()), rtol=1e-6, atol=1e-6)
    columns = torch.arange(rows) % 24
    nll = F.cross_entropy(expected.double(), columns, reduction="none")
    for held in (1, 1000):
        torch.testing.assert_close(linear.projection().nll(x, columns, held), nll, rtol=near, atol=near)


def test_experts_round_their_inputs() -> None:
    weight = get_precision("int8").store(normal(0, 3 * 16, 32), "weight", ScaleRule())
    x = normal(1, 5, 32)
    found = ExpertsLinear(weight, 3, BlockInput())(x, 2)
    torch.testing.assert_close(found, F.linear(BlockInput()(x), weight.tensor()[32:]), rtol=1e-5, atol=1e-5)


def test_what_is_rounded_is_multiplied_afterwards() -> None:
    x = normal(0, 3, 32)
    torch.testing.assert_close(Multiplied(HalfInput(), 0.3)(x), x.half().float() * 0.3, rtol=0, atol=0)


def test_a_head_rounds_before_logits_are_multiplied() -> None:
    checkpoint = checkpoint_of("granitemoehybrid/dense")
    config = checkpoint.config
    assert isinstance(config, HybridConfig)
    ids = windows_of("granitemoehybrid/dense").ids[:2]
    found = {}
    for by in (1.0, 0.3):
        converter = Converter(build(replace(config, logits_by=by), checkpoint.tensors), Scheme(activations="blocks"))
        found[by] = converter.convert(PrecisionMap.uniform("fp16", converter.components))(ids)
    torch.testing.assert_close(found[0.3], found[1.0] * 0.3, rtol=1e-5, atol=1e-6)


def test_stacked_maps_round_as_one_map_does() -> None:
    even = replace(HUGGING_FACE, d_model=32, d_inner=64, dt_rank=32)
    converter = Converter(random_model(even), Scheme(activations="blocks"))
    windows = some_windows(4)
    maps = [PrecisionMap.uniform(name, converter.components) for name in ("fp16", "int8", "int4")]
    stacked = evaluate_stacked(converter, maps, windows)
    for one, found in zip(maps, stacked, strict=True):
        alone = evaluate(converter.convert(one), windows)
        np.testing.assert_allclose(found.nll, alone.nll, rtol=1e-6)  # type: ignore[union-attr]
