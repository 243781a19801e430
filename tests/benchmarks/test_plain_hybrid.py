"""The plain way means the same by a precision map of a Granite hybrid as our conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.huggingface import plain_perplexity
from benchmarks.plain_hybrid import HYBRID, convert_hybrid, transformers_hybrid
from ssm_mp import load_model
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / HYBRID
WINDOWS = Windows(torch.randint(0, 8000, (8, 24), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "mixed"])
def test_the_plain_way_and_ours_find_the_same_perplexity(precision: str) -> None:
    theirs, model, scheme = transformers_hybrid(FOLDER), load_model(FOLDER), Scheme()
    statistics = calibrate(model, WINDOWS)
    converter = Converter(model, scheme, statistics)
    scales = {name: float(found.scale(scheme.input_scales)) for name, found in statistics.items()}
    chosen = PrecisionMap.uniform("int8" if precision == "mixed" else precision, converter.components)
    if precision == "mixed":
        generator = torch.Generator().manual_seed(0)
        free = [name for name, held in chosen if held == "int8"]
        kept = [name for name in free if torch.rand((), generator=generator) < 0.5]
        assert any(".experts." in name for name in kept)
        chosen = chosen.changed(dict.fromkeys(kept, "fp16"))
    expected = evaluate(converter.convert(chosen), WINDOWS).perplexity
    found = plain_perplexity(theirs, chosen.to_json(), scales, WINDOWS, convert_hybrid)
    assert found == pytest.approx(expected, rel=1e-3)  # a value halfway between two integers may go either way
    unrounded = evaluate(model, WINDOWS).perplexity
    assert abs(found - expected) < abs(unrounded - expected) or precision == "fp16"


def test_the_plain_way_leaves_the_model_as_it_is() -> None:
    theirs = transformers_hybrid(FOLDER)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    expert = "layers.0.block_sparse_moe.experts.0.input_linear"
    plain_perplexity(theirs, {expert: "int8", "embedding": "int8"}, {expert: 0.1}, WINDOWS, convert_hybrid)
    assert all(torch.equal(before[name], value) for name, value in theirs.state_dict().items())
