"""A whole search whose metric is the divergence from FP32, on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.study import Study
from optuna.trial import TrialState

from search.base.errors import StudyError
from search.cli.answers import fronted, stood
from search.measure.gradient import gradient_effects
from search.measure.objective import Baseline, measure_baseline
from search.measure.stacking import StackedObjective
from search.problem.run_directory import BASELINE, FIDELITY, FRONT, PROBES, REPORT, RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.problem.workspace import Workspace, open_workspace
from search.results.certify import bounds
from search.run.fidelity import stored_fidelity
from search.run.one_process import run_search
from search.run.status import standing
from search.trials.attributes import DIFFERENCES, MEASURED, unpacked
from search.trials.read_back import point_of
from search.trials.storage import read_study
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate, increase_of
from ssm_mp.precision_map import PrecisionMap
from tests.tiny import write_study

KEYS = [
    "search.metric=kl", "search.budget_nats=0.5", "search.trials=8", "search.seeds=3", "search.racing=false",
    'precision.choices=["fp16", "int8", "nf4"]',
]  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """A finished search of a divergence."""

    path: Path
    run: RunDirectory
    spec: StudySpec
    workspace: Workspace
    study: Study

    @property
    def front(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / FRONT).read_text())
        return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("kl")
    path = write_study(folder, windows=(4, 8, 64))
    spec, run = load_spec(path, KEYS), RunDirectory(folder / "run")
    run_search(spec, run, lambda line: None)
    return Searched(path, run, spec, open_workspace(spec, cache=run.path), read_study(run))


def slow_kl(workspace: Workspace, chosen: PrecisionMap, windows: Windows) -> np.ndarray:
    """KL(FP32 ‖ map) of each window in nats a token, from whole logits in float64: `[w]`."""
    model = workspace.converter.convert(chosen)
    with torch.inference_mode():
        p, q = (one(windows.ids)[:, :-1].double().log_softmax(-1) for one in (workspace.model, model))
    found: np.ndarray = (p.exp() * (p - q)).sum(-1).mean(-1).numpy()
    return found


def test_trials_measure_the_divergence_that_whole_logits_give(searched: Searched) -> None:
    space, windows = searched.workspace.space, searched.workspace.splits.search
    widest = {name: choices[0] for name, choices in space.choices.items()}
    trials = searched.study.get_trials(states=(TrialState.COMPLETE,))
    assert len(trials) == 8
    for trial in trials:
        point = point_of(trial, widest)
        slow = slow_kl(searched.workspace, space.map(point.map), windows)
        np.testing.assert_allclose(unpacked(trial.user_attrs[DIFFERENCES]), slow, rtol=1e-3, atol=1e-6)
        found = trial.user_attrs[MEASURED]
        assert math.log1p(found["increase_percent"] / 100) == pytest.approx(slow.mean(), rel=1e-3, abs=1e-6)
        assert trial.values[1] == found["increase_percent"]
        stderr = slow.std(ddof=1) / math.sqrt(slow.size)
        assert searched.spec.search.judged.spread(found["increase_percent"], found["stderr_percent"]) == pytest.approx(
            stderr, rel=1e-2, abs=1e-6
        )
        model = searched.workspace.converter.convert(space.map(point.map))
        assert found["perplexity"] == pytest.approx(evaluate(model, windows).perplexity, rel=1e-9)


def test_ends_and_probes_are_divergences_from_fp32(searched: Searched) -> None:
    workspace = searched.workspace
    space, windows = workspace.space, workspace.splits.search
    ends = {"widest": space.widest(), "lowest": space.lowest()}
    kl = {name: slow_kl(workspace, chosen, windows).mean() for name, chosen in ends.items()}
    stored = json.loads((searched.run / BASELINE).read_text())["ends"]
    assert stored == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in kl.items()}
    probes = [line["probe"] for line in searched.run.read_lines(PROBES)]
    assert {probe["end"] for probe in probes} == {"widest", "lowest"}
    for probe in probes:
        changed = ends[probe["end"]].changed({probe["component"]: probe["precision"]})
        rise = slow_kl(workspace, changed, windows).mean() - kl[probe["end"]]
        assert probe["log_increase"] == pytest.approx(rise, rel=1e-2, abs=2e-6)


def test_the_certificate_is_of_the_divergence_in_nats(searched: Searched) -> None:
    answer = searched.front
    assert (answer["metric"], answer["budget_nats"]) == ("kl", pytest.approx(0.5))
    certificate = answer["certificate"]
    assert certificate["verdict"] == "certified"
    winner = next(point for point in answer["front"] if point["trial"] == certificate["winner"])
    chosen = searched.workspace.space.map(winner["map"])
    rises = slow_kl(searched.workspace, chosen, searched.workspace.splits.certify)
    assert certificate["increase_nats"] == pytest.approx(rises.mean(), rel=1e-3)
    tried = next(one for one in certificate["tries"] if one["trial"] == certificate["winner"])
    _, upper = bounds(increase_of(rises), 1 - tried["confidence"])
    assert certificate["upper_nats"] == pytest.approx(math.log1p(upper / 100), rel=1e-2)
    assert certificate["upper_nats"] < 0.5
    assert "percent" not in json.dumps({key: held for key, held in answer.items() if key != "fidelity"})


def test_report_tables_and_artifact_speak_in_nats(searched: Searched) -> None:
    report, answer = (searched.run / REPORT).read_text(encoding="utf-8"), searched.front
    assert "budget 0.5 nats" in report
    assert "KL, nats (95 %)" in report
    assert "| KL, nats | over windows ≤ nats | over documents ≤ nats |" in report
    assert "another most probable next token" in report
    assert "KL, nats" in fronted(answer)
    assert "budget 0.5 nats" in fronted(answer)
    metrics = json.loads((searched.run / "winner/metrics.json").read_text())
    winner = next(point for point in answer["front"] if point["trial"] == answer["winner"])
    assert metrics["increase_nats"] == pytest.approx(winner["increase_nats"])
    assert (metrics["metric"], metrics["fidelity"]) == ("kl", answer["fidelity"])
    assert metrics["certificate"]["upper_nats"] == answer["certificate"]["upper_nats"]
    assert metrics["read_back"]["difference_nats_per_token"] < 1e-3


def test_status_speaks_in_nats(searched: Searched) -> None:
    from datetime import datetime

    search = searched.spec.search
    space = searched.run.space()
    found = standing(
        searched.study, space, search.trials, search.budget_percent, datetime.now(), metric=search.judged
    ).to_json()
    assert found["best"]["increase_nats"] == pytest.approx(searched.front["front"][0]["increase_nats"])
    assert found["growth"][-1]["hypervolume"] < 0.5 * 8
    assert " nats" in stood(found)


def test_the_winner_is_held_against_fp32_once_and_kept(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, stored = searched.front, json.loads((searched.run / FIDELITY).read_text())
    kl = np.array(stored["windows"]["kl"]) / stored["predicted"]
    winner = next(point for point in answer["front"] if point["trial"] == answer["winner"])
    slow = slow_kl(searched.workspace, searched.workspace.space.map(winner["map"]), searched.workspace.splits.certify)
    np.testing.assert_allclose(kl, slow, rtol=1e-3, atol=1e-6)
    assert answer["fidelity"]["kl_nats"] == pytest.approx(slow.mean(), rel=1e-3)
    monkeypatch.setattr("search.run.fidelity.depart", lambda *_: pytest.fail("measured again"))
    again = run_search(searched.spec, searched.run, lambda line: None)
    assert again.fidelity is not None
    assert again.fidelity.to_json() == answer["fidelity"]
    assert stored_fidelity(searched.run, answer["winner"]) == again.fidelity
    assert stored_fidelity(searched.run, answer["winner"] + 1) is None


def test_a_study_of_another_metric_is_not_continued(searched: Searched) -> None:
    other = load_spec(searched.path, [key for key in KEYS if "metric" not in key and "nats" not in key])
    with pytest.raises(StudyError, match=r"another metric.*metric: kl → None"):
        run_search(other, searched.run, lambda line: None)


def test_many_maps_at_once_measure_what_one_does(searched: Searched) -> None:
    workspace = searched.workspace
    objective = StackedObjective(workspace, measure_baseline(workspace))
    maps = [workspace.space.lowest(), workspace.space.widest()]
    for whole, one in zip(objective.all_windows(maps), maps, strict=True):
        assert not isinstance(whole, Exception)
        np.testing.assert_allclose(whole.differences, objective(one).differences, rtol=1e-3, atol=1e-6)


def test_a_race_is_run_on_divergences(tmp_path: Path) -> None:
    keys = ["search.metric=kl", "search.budget_nats=1e-4", 'precision.choices=["fp16", "nf4"]']
    workspace = open_workspace(load_spec(write_study(tmp_path, windows=(4, 64, 8)), keys))
    baseline: Baseline = measure_baseline(workspace)
    objective = StackedObjective(workspace, baseline)
    lowest = workspace.space.lowest()
    slow = slow_kl(workspace, lowest, workspace.splits.search)
    alone, [together] = objective.race(lowest, [], 0.01), objective.race_many([(lowest, [])], 0.01)
    assert not isinstance(together, Exception)
    for found in (alone, together):
        assert found.stopped == "over budget"
        assert found.increase.windows < 64
        assert found.lower_percent is not None
        assert 1e-4 < math.log1p(found.lower_percent / 100) < slow.mean()


def test_gradient_probes_of_a_divergence_are_its_curvature_alone(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    both = [
        gradient_effects(open_workspace(load_spec(path, [f"search.metric={metric}", "search.probe=gradient"])))
        for metric in ("perplexity", "kl")
    ]
    for name, held in both[0].items():
        for precision, of_perplexity in held.items():
            of_kl = both[1][name][precision]
            assert of_kl.first == 0
            assert of_kl.log_increase == of_kl.curvature == pytest.approx(of_perplexity.curvature)


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_an_evaluation_calls_as_often_as_its_progress_is_told(tmp_path: Path, metric: str) -> None:
    workspace = open_workspace(load_spec(write_study(tmp_path), [f"search.metric={metric}"]))
    model, judge = workspace.converter.convert(workspace.space.lowest()), workspace.judge
    for _ in range(2):
        calls: list[None] = []
        told = judge.layer_calls(model)
        judge(model, None, lambda: calls.append(None))  # noqa: B023, called at once
        assert len(calls) == told > 0
    parts: list[None] = []
    at = np.array([2, 0])
    judge(model, at, lambda: parts.append(None))
    assert len(parts) == judge.layer_calls(model, at) > 0
