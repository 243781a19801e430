"""Experts that calibration hardly reaches, or never, are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import FEW_TOKENS, InputStatistics, calibrate, hardly_reached
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.conversion.regroup import Grouping, regrouped
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.families.models import checkpoint_of, windows_of, write_family_study

SHUNNED = 3
AT = "layers.2.feed_forward"


def shunning(experts: Grouping) -> Checkpoint:
    """A model of whose experts one layer never chooses number 3."""
    checkpoint = checkpoint_of("lfm2_moe/plain")
    tensors = dict(checkpoint.tensors)
    bias = f"{AT}.expert_bias"
    tensors[bias] = tensors[bias].clone()
    tensors[bias][SHUNNED] = -100.0
    return regrouped(replace(checkpoint, tensors=tensors), experts)


def statistics_of(checkpoint: Checkpoint, count: int = 48) -> dict[str, InputStatistics]:
    return calibrate(build(checkpoint.config, checkpoint.tensors), windows_of("lfm2_moe/plain", count))


@pytest.mark.parametrize("experts", ["each", "together"])
def test_an_expert_that_is_never_chosen_is_named_first(experts: Grouping) -> None:
    found = [line for line in hardly_reached(statistics_of(shunning(experts))) if line.startswith(AT)]
    assert found[0] == f"{AT}.experts.{SHUNNED}: 0 tokens"
    assert not [line for line in found[1:] if line.endswith(": 0 tokens")]


@pytest.mark.parametrize("name", ["lfm2_moe/plain", "lfm2_moe/plain-together"])
def test_tokens_are_counted_by_expert(name: str) -> None:
    windows = windows_of(name, 5)
    found = calibrate(build(checkpoint_of(name).config, checkpoint_of(name).tensors), windows)
    counts = {key: one.tokens for key, one in found.items() if key.startswith(f"{AT}.experts") and key.endswith("w1")}
    assert sum(map(sum, counts.values())) == 2 * windows.ids.numel()
    assert sum(map(len, counts.values())) == 5
    assert found["layers.0.feed_forward.w1"].tokens == (windows.ids.numel(),)


def test_a_model_without_experts_has_nothing_to_name() -> None:
    model = build(checkpoint_of("bamba/plain").config, checkpoint_of("bamba/plain").tensors)
    assert hardly_reached(calibrate(model, windows_of("bamba/plain", 2))) == []  # fewer tokens than are few
    assert FEW_TOKENS > 2 * 24


def test_the_range_of_an_expert_that_no_token_reached_is_not_known() -> None:
    checkpoint = shunning("each")
    model = build(checkpoint.config, checkpoint.tensors)
    statistics = statistics_of(checkpoint)
    converter = Converter(model, Scheme("static"), statistics)
    here = [c for c in converter.components if c.multiplies_inputs and c.name.startswith(AT)]
    cannot = {c.name for c in here if converter.infeasible(c, "int8")}
    assert cannot == {f"{AT}.experts.{SHUNNED}.{leaf}" for leaf in ("w1", "w2", "w3")}
    one = next(c for c in converter.components if c.name == f"{AT}.experts.{SHUNNED}.w1")
    assert "no calibration token reached it" in (converter.infeasible(one, "int8") or "")
    assert converter.infeasible(one, "nf4") is None
    for activations in ("dynamic", "none"):
        assert Converter(model, Scheme(activations), statistics).infeasible(one, "int8") is None


def test_experts_together_have_one_range_which_the_others_show() -> None:
    checkpoint = shunning("together")
    model = build(checkpoint.config, checkpoint.tensors)
    statistics = statistics_of(checkpoint)
    converted = convert(model, PrecisionMap.uniform("int8", find_components(model)), Scheme("static"), statistics)
    windows = windows_of("lfm2_moe/plain")
    np.testing.assert_allclose(evaluate(converted, windows).nll, evaluate(model, windows).nll, rtol=0.1)
    each = statistics_of(shunning("each"))
    largest = max(one.largest for name, one in each.items() if name.startswith(AT) and name.endswith(".w2"))
    assert statistics[f"{AT}.experts.w2"].largest == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("experts", ["each", "together"])
def test_a_study_names_them_and_leaves_out_what_they_cannot_be(experts: str, tmp_path: Path) -> None:
    study = write_family_study(tmp_path, "lfm2_moe/plain", windows=(48, 4, 4))
    file = tmp_path / "model/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[f"model.{AT}.expert_bias"][SHUNNED] = -100.0
    save_file(tensors, file, {"format": "pt"})
    told: list[str] = []
    workspace = open_workspace(load_spec(study, [f"precision.experts={experts}"]), told.append)
    assert (
        len([line for line in told if "experts that calibration hardly reaches" in line and ": 0 tokens" in line]) == 1
    )
    choices = {name: held for name, held in workspace.space.choices.items() if name.startswith(f"{AT}.experts")}
    narrow = {name for name, held in choices.items() if held == ("fp16",)}
    shunned = {f"{AT}.experts.{SHUNNED}.{leaf}" for leaf in ("w1", "w2", "w3")}
    assert narrow == (shunned if experts == "each" else set())
    notes = [line for line in told if f"note: {AT}." in line and "is never int8" in line]
    assert len(notes) == len(narrow)
    assert torch.isfinite(torch.tensor(evaluate(workspace.model, workspace.splits.search).nll)).all()
