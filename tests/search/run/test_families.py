"""Every family through a whole search: probes, trials, certificate, winner, report, plots, export."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from typer.testing import CliRunner, Result

from search.base.errors import StudyError
from search.cli.main import app
from search.measure.gradient import gradient_effects, gradient_windows
from search.problem.run_directory import REPORT, WINNER, RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace, study_checkpoint
from search.run.one_process import run_search
from search.run.stored import redraw
from search.run.widening import check_or_widen
from ssm_mp.artifact import read_artifact
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import assemble
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import Scheme
from tests.families.models import GROUPED, MODELS, PLAIN, QUICK, Model, checkpoint_of, write_family_study
from tests.tiny import LENGTH as TINY_LENGTH

STEP = 0.001
"""Part of the way to a quantised value, so small that hardly a token goes to another expert."""
FOUR = 'precision.choices=["fp16","int8","nf4"]'
ALIKE = frozenset({"granitemoehybrid/dense", "nemotron_h/dense", "jamba/dense", "qwen3_5_moe/text-and-vision"})
"""What adds nothing to a whole search: another model has all of its blocks."""
SEARCHED = (
    *(name for name in PLAIN if name not in ALIKE),
    "itera-together", "granitemoehybrid/many-experts", "nemotron_h/experts-latent-together",
)  # fmt: skip
SLOPES = (
    *QUICK,
    "falcon_mamba/plain",
    "nemotron_h/dense",
    "falcon_h1/norm-then-gate",
    "jamba/dense",
    "qwen3_next/plain",
)
"""Between them every block; two evaluations for each component."""


def named(*names: str) -> pytest.MarkDecorator:
    """A test of these models, of which a developer's loop has two."""
    return pytest.mark.parametrize(
        "name", [name if name in QUICK[1:3] else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


KNOWN_AS = {
    "mamba": "layers.0.ssm.in_proj",
    "itera": "layers.1.moe.layer.experts.2.w1",
    "mamba2/groups-2": "layers.2.mixer.in_proj",
    "falcon_mamba/plain": "layers.0.mixer.x_proj",
    "bamba/plain": "layers.1.self_attn.q_proj",
    "granitemoehybrid/dense": "layers.0.shared_mlp.input_linear",
    "granitemoehybrid/experts": "layers.2.block_sparse_moe.experts.4.output_linear",
    "nemotron_h/dense": "layers.1.mixer.up_proj",
    "nemotron_h/experts": "layers.3.mixer.shared_experts.down_proj",
    "falcon_h1/norm-then-gate": "layers.1.feed_forward.gate_proj",
    "jamba/dense": "layers.0.mamba.dt_proj",
    "jamba/experts": "layers.1.feed_forward.experts.3.down_proj",
    "lfm2/plain": "layers.0.conv.in_proj",
    "lfm2_moe/plain": "layers.1.feed_forward.experts.0.w3",
    "qwen3_next/plain": "layers.0.linear_attn.in_proj_qkvz",
    "qwen3_5_text/plain": "layers.0.linear_attn.in_proj_qkv",
    "qwen3_5/text-and-vision": "layers.3.self_attn.o_proj",
    "qwen3_5_moe_text/plain": "layers.0.mlp.shared_expert.up_proj",
    "qwen3_5_moe/text-and-vision": "layers.0.mlp.experts.1.gate_proj",
}
"""A component of each family, by the name that its users know, less what stands before `layers`."""


def study_of(folder: Path, model: Model, extra: str = "") -> tuple[Path, list[str]]:
    """A study file of a model, and what groups its components."""
    length = TINY_LENGTH if model.source == "itera" else 24
    asked = [] if model.experts is None else [f"precision.experts={model.experts}"]
    asked += [f"precision.split={json.dumps(model.split)}"] if model.split else []
    return write_family_study(folder, model.source, extra, length=length), asked


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def quiet(line: str) -> None:
    """Told nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_goes_through_to_a_winner_that_is_exported(name: str, tmp_path: Path) -> None:
    study, asked = study_of(tmp_path, MODELS[name])
    directory = tmp_path / "run"
    result = run_search(load_spec(study, [*asked, FOUR]), RunDirectory(directory), quiet)
    assert result.counts.finished == 4
    assert result.counts.failed == 0
    assert result.winner is not None
    names = [c.name for c in find_components(checkpoint_of(name))]
    assert list(result.winner.map) == names
    report = (directory / REPORT).read_text()
    assert re.findall(r"^\| `(.*?)` \|", report, flags=re.MULTILINE) == names
    artifact = read_artifact(directory / WINNER)
    assert artifact.tensor_bytes == result.winner.bytes
    assert artifact.precision_map.to_json() == result.winner.map
    assert {path.name for path in directory.glob("*.png")} >= {"front.png", "sensitivities.png", "allocation.png"}
    options = [option for one in [*asked, FOUR] for option in ("--set", one)]
    places = (study, "--run-dir", directory, *options)
    exported = answer("export", *places, "--out", tmp_path / "out", "--pick", result.points[-1].trial)
    assert exported["bytes"] == result.points[-1].bytes
    assert exported["perplexity"] == pytest.approx(result.points[-1].perplexity, rel=1e-6)
    evaluated = answer("evaluate", tmp_path / "out", "--study", study)
    assert evaluated["perplexity"] == pytest.approx(result.points[-1].perplexity, rel=1e-6)
    assert answer("front", *places)["trials"] == 4
    drifted = answer("drift", tmp_path / "out", "--study", study, "--out", tmp_path / "drift.png")
    assert drifted["increase_percent"] == pytest.approx(result.points[-1].increase_percent, rel=1e-3, abs=1e-3)
    assert (drifted["long"] is None) == (checkpoint_of(name).config.max_tokens is not None)


@pytest.mark.parametrize("name", PLAIN)
def test_components_are_named_as_the_files_of_the_family_name_them(name: str) -> None:
    names = {component.name for component in find_components(checkpoint_of(name))}
    assert KNOWN_AS[name] in names


@named(*SLOPES)
def test_gradients_are_the_slopes_of_the_log_perplexity(name: str, tmp_path: Path) -> None:
    """A component's weights a little towards their int3 values: the change is the linear term."""
    study, asked = study_of(tmp_path, MODELS[name])
    overrides = [*asked, "precision.activations=none", 'precision.choices=["fp16","int3"]']
    workspace = open_workspace(load_spec(study, overrides))
    evaluate(workspace.model, workspace.splits.search)  # as a search does first: what that leaves is in nobody's way
    effects = gradient_effects(workspace)
    assert effects.keys() == {component.name for component in workspace.space.free}
    found, expected = [], []
    for component in workspace.space.free:
        low, high = (part_of_the_way(workspace, component.name, step) for step in (-STEP, STEP))
        found.append(effects[component.name]["int3"].first)
        expected.append((high - low) / (2 * STEP))
    largest = float(np.max(np.abs(found)))
    assert largest > 0
    close = np.isclose(found, expected, rtol=5e-2, atol=2e-2 * largest)
    # where a router's choice turns, the log-perplexity jumps, which no slope shows
    turns = any(c.kind == "router" for c in workspace.space.components)
    assert close.mean() >= (0.9 if turns else 1.0), [
        (c.name, f, e) for c, f, e, ok in zip(workspace.space.free, found, expected, close, strict=True) if not ok
    ]


def part_of_the_way(workspace: Workspace, name: str, step: float) -> float:
    """Mean log-perplexity with one component's weights `step` of the way to their int3 values."""
    modules = {c.name: workspace.model.component(c.name) for c in workspace.space.components}
    component = next(c for c in workspace.space.components if c.name == name)
    moved = Converter(workspace.model, Scheme(activations="none")).module(component, "fp16")
    target = workspace.converter.module(component, "int3")
    for parameter in component.parameters:
        held = stored(modules[name], parameter.leaf)
        if isinstance(held, FloatTensor):
            value = held.tensor() + step * (stored(target, parameter.leaf).tensor() - held.tensor())
            setattr(moved, parameter.leaf, FloatTensor(value))
    evaluation = evaluate(assemble(workspace.model.config, modules | {name: moved}), gradient_windows(workspace))
    return float(evaluation.nll.sum() / evaluation.tokens)


def stored(module: torch.nn.Module, leaf: str) -> Stored:
    held = module if isinstance(module, Stored) else getattr(module, leaf)
    assert isinstance(held, Stored)
    return held


@named(*PLAIN)
def test_gradients_of_inputs_and_of_unpinned_values_are_finite(name: str, tmp_path: Path) -> None:
    study, asked = study_of(tmp_path, MODELS[name])
    kinds = {c.kind for c in find_components(checkpoint_of(name)) if c.pin == "default"}
    workspace = open_workspace(load_spec(study, [*asked, FOUR, f"precision.unpin={json.dumps(sorted(kinds))}"]))
    effects = gradient_effects(workspace)
    assert effects.keys() == {c.name for c in workspace.space.components if c.pin != "always"}
    for component, held in effects.items():
        assert all(math.isfinite(effect.log_increase) for effect in held.values()), component
    multiplying = [c.name for c in workspace.space.components if c.multiplies_inputs]
    assert {name for name in multiplying if "int8" in effects[name] and effects[name]["int8"].curvature == 0.0} <= {
        name for name in multiplying if "expert" in name or "router" in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["granitemoehybrid/experts", "falcon_h1/norm-then-gate"])
def test_latencies_of_a_hybrid_are_measured_and_named(source: str, tmp_path: Path) -> None:
    study, _ = study_of(tmp_path, Model(source))
    directory = RunDirectory(tmp_path / "run")
    objectives = 'search.objectives=["compression","perplexity","latency"]'
    result = run_search(load_spec(study, [FOUR, objectives]), directory, quiet)
    assert result.latency is not None
    assert result.latency.seconds.keys() == {c.name for c in result.components}
    spent = {name: held["fp16"] for name, held in result.latency.seconds.items()}
    assert spent["embedding"] > 0
    assert all(spent[c.name] > 0 for c in result.components if c.kind in ("in_proj", "q_proj", "o_proj", "out_proj"))
    assert all(point.latency is not None for point in result.points)
    assert answer(
        "export", study, "--run-dir", directory.path, "--out", tmp_path / "out", "--pick", "fastest",
        "--set", FOUR, "--set", objectives,
    )["latency_seconds"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granitemoehybrid/experts-together-split", "qwen3_5_text/plain"])
def test_measured_probes_from_both_ends(name: str, tmp_path: Path) -> None:
    study, asked = study_of(tmp_path, MODELS[name])
    result = run_search(
        load_spec(study, [*asked, "search.probe=measured", "search.sampler=front"]),
        RunDirectory(tmp_path / "run"),
        quiet,
    )
    assert result.counts.finished == 4
    assert result.winner is not None


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    study, _ = study_of(tmp_path, MODELS["granitemoehybrid/experts"])
    directory = RunDirectory(tmp_path / "run")
    told: list[str] = []
    first = run_search(load_spec(study, ["search.trials=3"]), directory, quiet)
    again = run_search(load_spec(study, ["search.trials=5"]), directory, told.append)
    assert [p.map for p in again.points[:3]] == [p.map for p in first.points]
    assert len(again.points) == 5
    assert not any("measuring the baseline" in line for line in told)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([], ["precision.experts=together"], r"another grouping \(experts: None → 'together'\)"),
        (["precision.experts=together"], [], r"another grouping \(experts: 'together' → None\)"),
        ([], ['precision.split=["in_proj"]'], r"another grouping \(in_proj: None → 'split'\)"),
    ],
    ids=["together", "each", "split"],
)
def test_another_grouping_is_refused_and_named(first: list[str], second: list[str], said: str, tmp_path: Path) -> None:
    study, _ = study_of(tmp_path, MODELS["granitemoehybrid/experts"])
    run = RunDirectory(tmp_path / "run")
    one, other = (load_spec(study, ["precision.activations=none", *asked]) for asked in (first, second))
    with run.owned():
        check_or_widen(one, run, open_workspace(one).fingerprint(), quiet)
        check_or_widen(one, run, open_workspace(one).fingerprint(), quiet)
        with pytest.raises(StudyError, match=said) as caught:
            check_or_widen(other, run, open_workspace(other).fingerprint(), quiet)
    assert "another checkpoint" not in str(caught.value)
    assert "another space" not in str(caught.value)
    with pytest.raises(StudyError, match=said):
        redraw(other, run, optuna.create_study())
    assert ("grouping" in run.fingerprint()) == bool(first)


def test_what_is_default_may_be_said(tmp_path: Path) -> None:
    study, _ = study_of(tmp_path, MODELS["granitemoehybrid/experts"])
    prints = [
        open_workspace(load_spec(study, ["precision.activations=none", *asked])).fingerprint()
        for asked in ([], ["precision.experts=each"])
    ]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("name", GROUPED)
def test_a_study_groups_the_checkpoint_as_it_says(name: str, tmp_path: Path) -> None:
    study, asked = study_of(tmp_path, MODELS[name])
    checkpoint = study_checkpoint(load_spec(study, asked))
    assert checkpoint.config == checkpoint_of(name).config


@pytest.mark.slow
def test_plots_are_drawn_again_of_grouped_components(tmp_path: Path) -> None:
    study, asked = study_of(tmp_path, MODELS["granitemoehybrid/experts-together-split"])
    directory = RunDirectory(tmp_path / "run")
    spec = load_spec(study, [*asked, "search.trials=2"])
    run_search(spec, directory, quiet)
    options = [option for one in asked for option in ("--set", one)]
    drawn = answer("plot", study, "--run-dir", directory.path, *options)
    assert {Path(path).name for path in drawn.values()} >= {"front.png", "sensitivities.png"}
