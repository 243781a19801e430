"""Space, probes and surrogate on a tiny model."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.measure.objective import Objective, measure_baseline
from search.measure.probe import LOWEST, WIDEST, Probe, open_end, planned, probe_from_stored, run_probes
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.run.prepare import prepare
from search.sampling.catalogue import catalogue_of
from search.sampling.surrogate import best_within, fit, predicted_front, smallest_within
from ssm_mp.errors import DataError, InfeasibleError, PrecisionMapError, SsmMpError
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from tests.tiny import HUGGING_FACE, ITERA, random_tensors, write_study


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(load_spec(write_study(tmp_path)))


def test_free_components_are_those_without_a_pin(workspace: Workspace) -> None:
    free = {component.kind for component in workspace.space.free}
    assert free == {"embedding", "position_embedding", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    assert workspace.space.size == 2 ** len(workspace.space.free)
    assert workspace.space.lowest()["layers.0.ssm.A_log"] == "fp16"


def test_a_study_lifts_and_adds_pins(tmp_path: Path) -> None:
    extra = '[precision]\nunpin = ["norm"]\npin = ["layers.0.*", "embedding"]'
    free = {c.name for c in open_workspace(load_spec(write_study(tmp_path, extra=extra))).space.free}
    assert "norm" in free
    assert "layers.1.ssm.norm" in free
    assert "embedding" not in free
    assert not any(name.startswith("layers.0.") for name in free)
    for wrong in ('unpin = ["D"]', 'pin = ["layer.*"]', 'unpin = ["in_proj"]'):
        with pytest.raises(PrecisionMapError):
            open_workspace(load_spec(write_study(tmp_path, extra=f"[precision]\n{wrong}")))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lm_head.weight", slice(3)),
        ("embedding.weight", slice(3)),
        ("layers.0.ssm.in_proj.weight", 5),
        ("layers.1.ssm.conv1d.weight", 7),
        ("layers.1.ssm.x_proj.weight", slice(None)),
    ],
)
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_rows_that_vanish_bar_no_component_from_any_precision(
    tmp_path: Path, name: str, part: int | slice, activations: str
) -> None:
    from safetensors.torch import save_file

    config = replace(HUGGING_FACE, tied=False)
    study = write_study(tmp_path, config=config, extra='[precision]\nchoices = ["fp16", "int8", "nf4", "int4", "int3"]')
    tensors = random_tensors(config)
    wholes = []
    for factor in (1e-9, 0.0):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][part] *= factor
        save_file(changed, tmp_path / "model.safetensors")
        space = open_workspace(load_spec(study, [f"precision.activations={activations}"])).space
        assert not space.infeasible
        wholes.append(space.lowest().bytes(space.components, activations))  # type: ignore[arg-type]
    assert wholes[0] == wholes[1]


def test_what_cannot_be_held_is_left_out_of_the_space(tmp_path: Path) -> None:
    study = write_study(tmp_path, config=ITERA)
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.0.ssm.in_proj.weight"][0] *= 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    said: list[str] = []
    space = open_workspace(load_spec(study, ["precision.activations=none"]), said.append).space
    assert space.choices["layers.0.ssm.in_proj"] == ("int8",)
    assert "layers.0.ssm.in_proj" not in {c.name for c in space.free}
    assert space.widest()["layers.0.ssm.in_proj"] == "int8"
    assert any("never fp16" in line for line in said)
    tensors["layers.0.ssm.ssm.D"] = torch.full((32,), 1e6)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InfeasibleError, match=r"layers\.0\.ssm\.ssm\.D"):
        open_workspace(load_spec(study))


@pytest.mark.parametrize("text", ["short", "outside"])
def test_a_text_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    study = write_study(tmp_path)
    override = "data.certify_windows=900" if text == "short" else "data.text=other.npy"
    if text == "outside":
        import numpy as np

        np.save(tmp_path / "other.npy", np.full(2000, 64))
    with pytest.raises(DataError, match="asked for" if text == "short" else "outside the model's vocabulary"):
        open_workspace(load_spec(study, [override]))


def test_a_window_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SsmMpError, match="positions for 16"):
        open_workspace(load_spec(write_study(tmp_path), ["data.window=17"]))


def test_synthetic_calibration_uses_no_text(tmp_path: Path) -> None:
    spec = load_spec(write_study(tmp_path), ["data.calibration=synthetic", "data.calibration_windows=9"])
    assert len(open_workspace(spec).splits.calibration) == 9
    assert load_spec(write_study(tmp_path)).data.calibration_count == 4


def all_probes(workspace: Workspace) -> list[Probe]:
    ends = (open_end(workspace, WIDEST), open_end(workspace, LOWEST))
    return run_probes(workspace, ends, [], lambda probe: None)


@pytest.mark.parametrize("family", ["mamba", "itera"])
def test_probes_from_both_ends_agree_with_direct_evaluation(tmp_path: Path, family: str) -> None:
    from tests.tiny import CONFIGS

    workspace = open_workspace(load_spec(write_study(tmp_path, config=CONFIGS[family])))
    probes = all_probes(workspace)
    assert len(probes) == planned(workspace) == 2 * len(workspace.space.free)
    windows, converter = workspace.splits.search, workspace.converter
    for end, base in ((WIDEST, workspace.space.widest()), (LOWEST, workspace.space.lowest())):
        reference = evaluate(converter.convert(base), windows)
        for probe in (p for p in probes if p.end == end):
            changed = evaluate(converter.convert(base.changed({probe.component: probe.precision})), windows)
            direct = paired_increase(changed, reference)
            assert (probe.log_increase, probe.log_stderr) == (direct.log_mean, direct.log_stderr)
            assert probe.origin == base[probe.component] != probe.precision
            assert probe.kl is not None
            assert probe.kl >= 0


def test_probes_done_before_are_not_measured_again(workspace: Workspace) -> None:
    probes = all_probes(workspace)
    ends = (open_end(workspace, WIDEST), open_end(workspace, LOWEST))
    measured: list[Probe] = []
    again = run_probes(workspace, ends, probes[:-3], measured.append)
    assert measured == probes[-3:]
    assert again == probes
    assert probe_from_stored(probes[0].stored()) == probes[0]


def test_the_best_maps_of_every_size_equal_brute_force(workspace: Workspace) -> None:
    baseline = measure_baseline(workspace)
    space = workspace.space
    offsets = [
        paired_increase(evaluate(workspace.converter.convert(m), workspace.splits.search), baseline.evaluation).log_mean
        for m in (space.widest(), space.lowest())
    ]
    surrogate = fit(space, all_probes(workspace), *offsets)
    catalogue = catalogue_of(space, "static")
    names = [c.name for c in space.free]
    maps = [
        dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(space.choices[name] for name in names))
    ]
    sizes = [space.map(m).bytes(space.components, "static") for m in maps]
    costs = [surrogate.predict(m) for m in maps]
    assert catalogue.bytes(np.array([catalogue.encode(m) for m in maps])).tolist() == sizes
    low, high = min(sizes), max(sizes)
    for limit in (low, (2 * low + high) // 3, (low + high) // 2, high):
        best = best_within(surrogate, catalogue, limit)
        assert best is not None
        assert space.map(best).bytes(space.components, "static") <= limit
        expected = min(cost for size, cost in zip(sizes, costs, strict=True) if size <= limit)
        assert surrogate.predict(best) == pytest.approx(expected, abs=1e-12)
    assert best_within(surrogate, catalogue, low - 1) is None
    for allowed in (min(costs), sorted(costs)[len(costs) // 3], max(costs)):
        smallest = smallest_within(surrogate, catalogue, allowed + 1e-12)
        assert smallest is not None
        expected_size = min(size for size, cost in zip(sizes, costs, strict=True) if cost <= allowed + 1e-12)
        assert space.map(smallest).bytes(space.components, "static") == expected_size
    assert smallest_within(surrogate, catalogue, min(costs) - 1e-3) is None


def test_the_surrogate_is_exact_where_effects_add_up(workspace: Workspace) -> None:
    space = workspace.space
    true = {c.name: 0.001 * (i + 1) for i, c in enumerate(space.free)}
    probes = [
        probe
        for name, cost in true.items()
        for probe in (
            Probe(name, "int8", WIDEST, "fp16", cost, 1e-4, 0.0),
            Probe(name, "fp16", LOWEST, "int8", -cost, 1e-4, 0.0),
        )
    ]
    surrogate = fit(space, probes, 0.0005, 0.0005 + sum(true.values()))
    assert surrogate.gap == pytest.approx(0)
    chosen = {**space.chosen(space.widest()), "embedding": "int8", "layers.1.ssm.out_proj": "int8"}
    assert surrogate.predict(chosen) == pytest.approx(0.0005 + true["embedding"] + true["layers.1.ssm.out_proj"])
    front = predicted_front(surrogate, catalogue_of(space, "static"), 6, math.log1p(0.05))
    assert 1 <= len(front) <= 6
    assert len({tuple(m.items()) for m in front}) == len(front)


def test_racing_through_all_rungs_measures_what_one_evaluation_does(tmp_path: Path) -> None:
    workspace = open_workspace(load_spec(write_study(tmp_path, windows=(4, 40, 16))))
    objective = Objective(workspace, measure_baseline(workspace))
    whole = objective(workspace.space.lowest())
    raced = objective.race(workspace.space.lowest(), [], 1e-9)
    assert raced.stopped is None
    assert raced.increase.windows == 40
    assert raced.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert raced.differences == pytest.approx(whole.differences, abs=1e-7)
    rival = (1, whole.differences - 0.05 * (1 + np.arange(40) % 2))
    stopped = objective.race(workspace.space.lowest(), [rival], 0.05)
    assert stopped.stopped == "dominated"
    assert stopped.increase.windows == stopped.differences.size < 40
    # a random sample of the windows, not the beginning of the text
    assert set(np.round(stopped.differences, 6)) <= set(np.round(whole.differences, 6))
    assert stopped.differences[:16] != pytest.approx(whole.differences[:16])


@pytest.mark.parametrize("probe", ["measured", "gradient", "none"])
def test_a_study_without_a_free_component_can_be_prepared(tmp_path: Path, probe: str) -> None:
    spec = load_spec(write_study(tmp_path, extra='[precision]\npin = ["*"]'), [f"search.probe={probe}"])
    run = RunDirectory(tmp_path / "run")
    with run.owned():
        prepared = prepare(spec, run, lambda line: None)
    assert prepared.probes == []
    assert prepared.knowledge.catalogue.maps == 1
