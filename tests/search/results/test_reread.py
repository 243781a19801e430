"""What was written is read back and held against what was converted and measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.measure.objective import Baseline, measure_baseline
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.results import export as exporting
from search.results.export import export, timing_seconds
from search.results.gates import Facts, judge
from search.results.known import known_of
from search.results.reread import Expected, different_arrays, reread
from search.run.one_process import run_search
from search.trials.storage import read_study
from ssm_mp.artifact import stored_arrays
from ssm_mp.data import Windows
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.model import LanguageModel
from tests.tiny import write_study


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Workspace, Baseline]:
    workspace = open_workspace(load_spec(write_study(tmp_path)))
    return workspace, measure_baseline(workspace)


def test_one_bit_of_one_array_is_a_difference(opened: tuple[Workspace, Baseline]) -> None:
    workspace, _ = opened
    chosen = workspace.space.lowest()
    ours = workspace.converter.convert(chosen)
    fresh = open_workspace(workspace.spec).converter.convert(chosen)
    assert different_arrays(ours, fresh) == []
    name, array = next((name, a) for name, a in stored_arrays(fresh).items() if a.dtype == torch.int8)
    array.view(-1)[0] ^= 1
    assert different_arrays(ours, fresh) == [name]


def test_another_perplexity_than_was_measured_here_is_not_kept(
    tmp_path: Path, opened: tuple[Workspace, Baseline], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, baseline = opened
    true = exporting._measured(workspace, baseline, workspace.space.lowest())
    wrong = dataclasses.replace(true.measured, perplexity=true.measured.perplexity * (1 + 1e-12))
    monkeypatch.setattr(exporting, "_measured", lambda *_: Expected(wrong, 0.1))
    with pytest.raises(ArtifactError, match="what was read back is not what was measured, and was not kept"):
        export(workspace, baseline, workspace.space.lowest(), tmp_path / "out", seconds=0.0)
    assert not (tmp_path / "out").exists()


def test_what_a_trial_measured_may_differ_by_rounding_and_no_more(
    tmp_path: Path, opened: tuple[Workspace, Baseline]
) -> None:
    workspace, baseline = opened
    measured = exporting._measured(workspace, baseline, workspace.space.lowest()).measured

    def of(difference: float) -> None:
        known = dataclasses.replace(measured, differences=measured.differences + difference)
        export(workspace, baseline, workspace.space.lowest(), tmp_path / "out", known=known, replace=True, seconds=0.0)

    of(1e-6)
    told = json.loads((tmp_path / "out/metrics.json").read_text())["read_back"]
    assert told["windows"] == told["of_windows"] == 8
    assert 0 < told["difference_nats_per_token"] < 1e-5
    with pytest.raises(ArtifactError, match="perplexity"):
        of(2e-3)


def test_where_time_is_short_fewer_windows_are_evaluated_and_that_is_said(
    tmp_path: Path, opened: tuple[Workspace, Baseline], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, baseline = opened
    seen: list[int] = []

    def watched(model: LanguageModel, windows: Windows, *more: Any) -> Evaluation:
        seen.append(len(windows))
        return evaluate(model, windows, *more)

    monkeypatch.setattr("search.problem.judge.evaluate", watched)
    expected = exporting._measured(workspace, baseline, workspace.space.lowest())
    exported = export(workspace, baseline, workspace.space.lowest(), tmp_path / "out", seconds=0.0)
    model = workspace.converter.convert(workspace.space.lowest())
    seen.clear()
    slow = Expected(expected.measured, 80.0)
    found = reread(tmp_path / "out", model, workspace, baseline, slow, exported.artifact.tensor_bytes, seconds=30.0)
    assert (seen, found.windows) == ([3], 3)
    assert found.sentence == "same arrays, same likelihood on 3 of 8 windows"


def test_a_trial_is_known_and_its_winner_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["search.trials=4", "search.probe=none", "search.budget_percent=1000"]
    spec, run = load_spec(write_study(tmp_path), overrides), RunDirectory(tmp_path / "run")
    monkeypatch.setattr(exporting, "_measured", lambda *_: pytest.fail("measured again"))
    result = run_search(spec, run, lambda line: None)
    assert result.winner is not None
    known = known_of(read_study(run), result.winner.trial)
    assert known is not None
    told = json.loads((run / "winner/metrics.json").read_text())
    assert told["perplexity"] == known.perplexity == result.winner.perplexity
    assert told["increase_percent"] == pytest.approx(result.winner.increase_percent, rel=1e-12)
    assert np.isfinite(told["increase_interval_percent"]).all()


def test_timing_takes_a_tenth_of_the_search_and_never_more_than_its_bound() -> None:
    assert [timing_seconds(spent) for spent in (0.0, 50.0, 100.0, 250.0, 1e6)] == [5.0, 5.0, 10.0, 25.0, 30.0]


def test_a_speed_that_was_not_measured_warns_and_says_why(opened: tuple[Workspace, Baseline], tmp_path: Path) -> None:
    workspace, baseline = opened
    exported = export(workspace, baseline, workspace.space.lowest(), tmp_path / "out", seconds=0.0)
    assert exported.facts.speedup is None
    assert "prefill of 32 not measured: it would have taken about" in exported.facts.untimed
    assert json.loads((tmp_path / "out/metrics.json").read_text())["benchmark"]["left_out"]
    assert Facts(2.0, None, 0).untimed == ""
    assert judge(None, exported.facts)[0].verdict == "fail"
