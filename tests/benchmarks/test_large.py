"""A whole search, timed from outside: what is read from its words, its trials and GNU time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from benchmarks import large
from benchmarks.large import (
    PLANS,
    Plan,
    Row,
    certificate_seconds,
    measure,
    run_search,
    table,
    trials_between,
    write_study,
)
from benchmarks.widen import SIZES, Widening
from search.problem.run_directory import DATABASE
from search.problem.spec import load_spec

ROW = Row(
    size="94m", plan=PLANS["94m"], parameters=93_832_704, checkpoint_bytes=1 << 30, memory_gib=None,
    peak_bytes=2 << 30, before=30.0, trials=20.0, after=15.0, certificate=10.0, total=65.0, evaluation=4.0,
    perplexity=29.88, cost_percent=0.27, winner_bytes=51_000_000, compression=7.37, increase_percent=2.07,
    verdict="certified", lines=(),
)  # fmt: skip


def test_every_size_has_a_plan_and_its_study_is_valid(tmp_path: Path) -> None:
    assert PLANS.keys() == SIZES.keys()
    for plan in PLANS.values():
        write_study(tmp_path / "study.toml", tmp_path / 'a "model"', plan)
        spec = load_spec(tmp_path / "study.toml")
        assert spec.checkpoint_path == tmp_path / 'a "model"'
        assert (spec.data.window, spec.data.search_windows, spec.search.trials) == (
            plan.window,
            plan.search,
            plan.trials,
        )
        assert (spec.precision.activations, spec.search.probe) == (plan.activations, plan.probe)


def test_the_certificate_lasts_from_its_line_to_the_next_that_is_no_progress_of_it() -> None:
    said = [
        (1.0, "trials 8/8"),
        (2.0, "certifying on 64 windows"),
        (9.0, "certifying 3/4"),
        (12.5, "exporting trial 3"),
    ]
    assert certificate_seconds(said) == 10.5
    assert certificate_seconds(said[:1]) == 0


def test_trials_last_from_the_first_to_begin_to_the_last_to_end(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="any", storage=f"sqlite:///{tmp_path / DATABASE}")
    finished = [(TrialState.COMPLETE, 3, 9), (TrialState.PRUNED, 2, 4)]
    for state, began, done in finished:
        trial = create_trial(state=state, value=1.0)
        trial.datetime_start, trial.datetime_complete = (datetime(2020, 1, 1, second=at) for at in (began, done))
        study.add_trial(trial)
    study.enqueue_trial({})
    first, last = trials_between(tmp_path)
    assert last - first == 7


def test_the_target_is_what_the_model_needs_or_the_memory_that_was_asked_for() -> None:
    assert ROW.aim == pytest.approx(2.7 * (1 << 30))
    assert replace(ROW, memory_gib=2.0).aim == 2 << 30
    assert replace(ROW, memory_gib=4.0).aim == ROW.aim


def test_the_table_states_memory_time_and_what_was_found() -> None:
    shown = table([ROW, replace(ROW, size="7b", peak_bytes=None, winner_bytes=None, verdict="inconclusive")])
    assert (
        "| 94m | 94 M | 1.00 GiB | 2.00 GiB | 0.74 | 30 s = 7.5 evaluations | 20 s of 24 | 15 s (10 s) | 65 s |"
        in shown
    )
    assert "| 94m | 29.88, +0.27 % | static | 51,000,000 bytes | 7.37× | +2.07 % | certified |" in shown
    assert "| 7b | 94 M | 1.00 GiB | ? | ? |" in shown
    assert "| 7b | 29.88, +0.27 % | static | – | – | – | inconclusive |" in shown


def test_a_search_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    write_study(tmp_path / "study.toml", tmp_path / "nothing", PLANS["94m"])
    with pytest.raises(RuntimeError, match="nothing"):
        run_search(tmp_path / "study.toml", tmp_path / "run", [], 60.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("time") is None, reason="needs GNU time")
def test_a_small_model_is_measured_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(large.ROOT)
    monkeypatch.setitem(SIZES, "94m", Widening(layers=5, width=256, rank=8))
    plan = Plan(window=64, calibration=4, search=6, certify=64, trials=4)
    row = measure("94m", plan, tmp_path, {"search.seed": "3"}, 300.0)
    assert row.parameters * 4 < row.checkpoint_bytes < row.parameters * 4 + 10_000
    assert row.peak_bytes is not None
    assert row.checkpoint_bytes < row.peak_bytes < 4 << 30
    assert row.total == pytest.approx(row.before + row.trials + row.after)
    assert min(row.before, row.trials, row.after, row.evaluation) > 0
    assert row.certificate < row.after
    assert abs(row.cost_percent) < 3
    assert (row.verdict == "certified") == (row.winner_bytes is not None)
