"""Probe costs by formula and the fit of trials, on numbers that are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.scaling import Stages, all_probes_seconds, fit, half_int8, probe_seconds, work
from benchmarks.shapes import LENGTH, RANDOM, initial_tensors, workspace_of
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.evaluation.evaluate import evaluate
from tests.tiny import HUGGING_FACE

STAGES = Stages(embed=1.0, layer=10.0, head=100.0, both_heads=1100.0)


def tiny_checkpoint() -> Checkpoint:
    return Checkpoint(Path("tiny"), "canonical", HUGGING_FACE, initial_tensors(HUGGING_FACE))


def test_a_probe_runs_the_layers_from_its_own_on() -> None:
    assert probe_seconds(STAGES, 4, 0) == 1 + 40 + 100 + 1000
    assert [probe_seconds(STAGES, 4, stage) for stage in (1, 2, 3, 4)] == [1140, 1130, 1120, 1110]


def test_all_probes_are_both_ends_their_prefixes_and_one_probe_a_free_component() -> None:
    workspace = workspace_of(tiny_checkpoint(), 2)
    assert len(workspace.space.free) == 1 + 5 * 2
    ends_and_prefixes = (1 + 20 + 100) + (1 + 0) + (1 + 10)
    assert all_probes_seconds(workspace, STAGES) == 2 * (ends_and_prefixes + 1121 + 5 * 1120 + 5 * 1110)


def test_half_of_the_free_components_are_int8_and_the_map_can_be_evaluated() -> None:
    workspace = workspace_of(tiny_checkpoint(), 2)
    held = half_int8(workspace).to_json()
    lowered = [component.name for component in workspace.space.free if held[component.name] == "int8"]
    assert len(lowered) == len(workspace.space.free) // 2
    assert evaluate(workspace.converter.convert(half_int8(workspace)), workspace.splits.search).perplexity > 1


def test_the_fit_finds_the_rates_that_trials_were_made_of() -> None:
    rates = {"multiplications": 2e-11, "scan_values": 5e-10, "logits": 3e-9}
    rows = []
    for config in RANDOM.values():
        counted = work(config)
        token = sum(rates[kind] * counted[kind] for kind in rates)
        rows.append({"work": counted, "trials": [{"windows": w, "seconds": w * LENGTH * token} for w in (8, 16)]})
    found = fit(rows)
    assert found["nanoseconds"] == pytest.approx({kind: 1e9 * rate for kind, rate in rates.items()}, rel=1e-6)
    assert found["largest_error"] < 1e-9


def test_the_130m_shape_has_as_many_parameters_as_the_published_model() -> None:
    assert sum(math.prod(parameter.shape) for parameter in RANDOM["130m"].parameters()) == 129_135_360
