"""Sensitivities from gradients alone, on tiny models of both families."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from search.measure.backward import window_nll
from search.measure.gradient import gradient_effects, gradient_evaluations, gradient_windows
from search.measure.weighing import Tally, differentiable
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import assemble
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.stored import FloatTensor
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, write_study

PRECISION = '[precision]\nchoices = ["fp16", "int8", "nf4", "int3"]\nembedding_blocks = [8, 24]'
FAMILIES = ("mamba", "huggingface", "itera")


def open_tiny(folder: Path, family: str = "mamba", *overrides: str) -> Workspace:
    study = write_study(folder, config=CONFIGS[family], extra=PRECISION)
    return open_workspace(load_spec(study, overrides))


def part_of_the_way(workspace: Workspace, name: str, precision: str, step: float) -> float:
    """Mean log-perplexity with one component's weights `step` of the way to their quantised values."""
    modules = {c.name: workspace.model.component(c.name) for c in workspace.space.components}
    component = next(c for c in workspace.space.components if c.name == name)
    moved = Converter(workspace.model, Scheme(activations="none")).module(component, "fp16")
    for parameter in component.parameters:
        held = getattr(modules[name], parameter.leaf)
        if isinstance(held, FloatTensor):
            target = getattr(workspace.converter.module(component, precision), parameter.leaf).tensor()
            setattr(moved, parameter.leaf, FloatTensor(held.tensor() + step * (target - held.tensor())))
    model = assemble(workspace.model.config, modules | {name: moved})
    evaluation = evaluate(model, gradient_windows(workspace))
    return float(evaluation.nll.sum() / evaluation.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_term_is_the_slope_of_the_log_perplexity(tmp_path: Path, family: str) -> None:
    workspace = open_tiny(tmp_path, family, "precision.activations=none")
    effects = gradient_effects(workspace)
    for component in workspace.space.free:
        step = 0.02
        slope = (
            part_of_the_way(workspace, component.name, "int3", step)
            - part_of_the_way(workspace, component.name, "int3", -step)
        ) / (2 * step)
        assert effects[component.name]["int3"].first == pytest.approx(slope, rel=2e-2, abs=2e-4), component.name


def test_the_linear_term_of_inputs_is_the_slope_too(tmp_path: Path) -> None:
    both, weights = open_tiny(tmp_path), open_tiny(tmp_path, "mamba", "precision.activations=none")
    name, step = "layers.1.ssm.out_proj", 0.25  # float32 rounding must not show in the difference
    component = next(c for c in both.space.components if c.name == name)
    quantizer = both.converter.module(component, "int8").inputs

    class Nudged(Linear):
        sign = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, scale = quantizer(x.reshape(-1, x.shape[-1]))  # type: ignore[operator]
            return super().forward(x + self.sign * step * ((q.float() * scale).reshape(x.shape) - x))

    modules = {c.name: both.model.component(c.name) for c in both.space.components}
    nudged = Nudged(modules[name].weight, modules[name].bias)  # type: ignore[arg-type]
    model = assemble(both.model.config, modules | {name: nudged})
    up = evaluate(model, gradient_windows(both))
    nudged.sign = -1.0
    down = evaluate(model, gradient_windows(both))
    slope = (up.nll.sum() - down.nll.sum()) / up.tokens / (2 * step)
    of_inputs = gradient_effects(both)[name]["int8"].first - gradient_effects(weights)[name]["int8"].first
    assert of_inputs == pytest.approx(slope, rel=5e-2, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_differentiable_model_is_the_model(tmp_path: Path, family: str) -> None:
    workspace = open_tiny(tmp_path, family)
    model = differentiable(workspace, [Tally()])
    ids = workspace.splits.search.ids
    torch.testing.assert_close(model(ids), workspace.model(ids), rtol=1e-4, atol=1e-5)
    windows = Windows(ids[:1])
    assert window_nll(model, windows.ids).item() == pytest.approx(evaluate(workspace.model, windows).nll[0], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_every_free_component_has_a_finite_effect_at_each_of_its_choices(
    tmp_path: Path, family: str, activations: str
) -> None:
    workspace = open_tiny(tmp_path, family, f"precision.activations={activations}")
    before = {name: tensor.clone() for name, tensor in workspace.model.state_dict().items()}
    seen: list[None] = []
    effects = gradient_effects(workspace, lambda: seen.append(None))
    assert len(seen) == len(workspace.splits.calibration)
    assert {c.name: workspace.space.choices[c.name] for c in workspace.space.free} == {
        name: tuple(held) for name, held in effects.items()
    }
    for held in effects.values():
        for effect in held.values():
            assert math.isfinite(effect.log_increase)
            assert effect.log_stderr >= 0
            assert effect.curvature >= 0
            assert effect.log_increase == pytest.approx(effect.first + effect.curvature)
    assert all(not p.requires_grad and p.grad is None for p in workspace.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in workspace.model.state_dict().items())


def test_unpinned_bare_values_have_effects(tmp_path: Path) -> None:
    effects = gradient_effects(open_tiny(tmp_path, "itera", 'precision.unpin=["norm", "router", "B", "C"]'))
    assert effects["layers.0.ssm.ssm.B"]["int3"].curvature > 0
    assert effects["layers.1.moe.layer.router.gate"]["int3"].curvature >= 0


def test_a_weight_that_is_held_exactly_has_no_effect(tmp_path: Path) -> None:
    workspace = open_tiny(tmp_path, "mamba", "precision.activations=none")
    weight = workspace.model.component("layers.0.ssm.in_proj").weight
    assert isinstance(weight, FloatTensor)
    with torch.no_grad():
        weight.value.copy_(torch.where(weight.value > 0, 127 * 2.0**-10, -127 * 2.0**-10))
    exact = Converter(workspace.model, workspace.converter.scheme)
    effects = gradient_effects(replace(workspace, converter=exact))["layers.0.ssm.in_proj"]
    for precision in ("fp16", "int8"):
        assert (effects[precision].log_increase, effects[precision].log_stderr) == (0.0, 0.0)
    assert effects["int3"].log_increase != 0.0


def test_made_up_calibration_windows_have_no_likelihood_to_differentiate(tmp_path: Path) -> None:
    workspace = open_tiny(tmp_path, "mamba", "data.calibration=synthetic", "data.calibration_windows=9")
    assert gradient_windows(workspace) is workspace.splits.search
    assert gradient_evaluations(workspace) == 3.0
    assert gradient_evaluations(open_tiny(tmp_path)) == 3 * 4 / 8
