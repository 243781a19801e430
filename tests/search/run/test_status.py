"""How a search stands: counts, rate, time left, hypervolume; and the commands that only look."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.front import hypervolume
from search.cli.answers import stood
from search.problem.run_directory import FINGERPRINT, RunDirectory
from search.run.status import Running, empty_standing, queued_jobs, standing
from search.slurm.queue import QueuedTask
from search.trials.owner import Owner
from search.trials.read_back import ASKED, point_of
from search.trials.storage import choose_storage, connect
from tests.cluster.processes import HUNG, wait_until
from tests.cluster.studying import ENVIRONMENT, answer, refused, running, ssm_mp
from tests.tiny import write_study

START = datetime(2030, 1, 1, 12, 0, 0)
SPACE = {"a": ("fp16", "int8"), "b": ("fp16", "int8"), "pinned": ("fp16",)}
BUDGET = 5.0
HERE = Owner("lease", "host1", "node1", 77, "12_3", 1)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def made(
    number: int,
    state: TrialState = TrialState.COMPLETE,
    *,
    compression: float = 2.0,
    increase: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    user: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """A trial of a made-up study; its map is of no account."""
    figures = {
        "bytes": round(1_000_000 / compression), "perplexity": 10.0, "increase_percent": increase,
        "stderr_percent": 0.1, "windows": 50, "of_windows": 50, "compression": compression,
        "stopped": "dominated" if state == TrialState.PRUNED else None,
    }  # fmt: skip
    finished = state in (TrialState.COMPLETE, TrialState.PRUNED)
    return FrozenTrial(
        number=number, trial_id=number, state=state, value=None,
        values=[compression, increase] if state == TrialState.COMPLETE else None,
        datetime_start=None if state == TrialState.WAITING else at(start),
        datetime_complete=at(end) if state.is_finished() else None,
        params={"a": "fp16", "b": "int8"},
        distributions={name: CategoricalDistribution(SPACE[name]) for name in ("a", "b")},
        user_attrs={**({"measured": figures} if finished else {}), **(user or {})}, system_attrs={},
        intermediate_values={},
    )  # fmt: skip


def study_of(trials: Sequence[FrozenTrial], storage: Any = None) -> Study:
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    study.add_trials(trials)
    return study


def mixed() -> list[FrozenTrial]:
    """A trial in each state, and more."""
    return [
        *(made(i, compression=2 + i, increase=float(i), start=2.0 * i, end=2.0 * i + 2) for i in range(4)),
        made(4, TrialState.PRUNED, compression=9.0, increase=1.0, start=8.0, end=10.0),
        made(5, TrialState.FAIL, user={"reason": "not finite"}),
        made(6, TrialState.FAIL, user={"reason": "interrupted, and tried again"}),
        made(7, TrialState.FAIL, user={"reason": "interrupted, and tried again"}),
        made(8, TrialState.RUNNING, start=9.0, user={"owner": HERE.to_json()}),
        made(9, TrialState.WAITING),
    ]


def test_every_state_is_counted_and_every_running_trial_named() -> None:
    found = standing(study_of(mixed()), SPACE, 15, BUDGET, at(12.0))
    assert (found.asked, found.finished, found.stopped, found.failed, found.waiting) == (15, 5, 1, 3, 1)
    assert found.running == (Running(8, "12_3", "node1", 3.0),)
    assert list(found.reasons.items()) == [("interrupted, and tried again", 2), ("not finite", 1)]


def test_rate_and_time_left_follow_the_last_trials() -> None:
    found = standing(study_of(mixed()), SPACE, 15, BUDGET, at(12.0))
    assert found.trials_per_hour == pytest.approx(1800)  # one every two seconds
    assert found.seconds_left == pytest.approx(20)
    slow_then_fast = [made(i, end=100.0 * i) for i in range(10)] + [made(i, end=1000.0 + i) for i in range(10, 40)]
    assert standing(study_of(slow_then_fast), SPACE, 50, BUDGET, at(0)).trials_per_hour == pytest.approx(3600)


def test_what_cannot_be_known_is_not_guessed() -> None:
    one = standing(study_of([made(0)]), SPACE, 5, BUDGET, at(0))
    assert (one.trials_per_hour, one.seconds_left) == (None, None)
    at_once = standing(study_of([made(0), made(1)]), SPACE, 5, BUDGET, at(0))
    assert (at_once.trials_per_hour, at_once.seconds_left) == (None, None)
    none = standing(study_of([]), SPACE, 5, BUDGET, at(0))
    assert (none.finished, none.best, none.growth, none.running) == (0, None, (), ())


def test_a_finished_study_has_no_time_left() -> None:
    assert standing(study_of(mixed()), SPACE, 5, BUDGET, at(12.0)).seconds_left == 0.0


def test_a_study_says_itself_how_many_trials_it_is_to_have() -> None:
    study = study_of(mixed())
    study.set_user_attr(ASKED, {"trials": 15, "budget_percent": BUDGET, "asked": 17})
    assert standing(study, SPACE, 15, BUDGET, at(12.0)).asked == 17


def test_the_best_is_the_smallest_map_with_all_windows_within_the_budget() -> None:
    best = standing(study_of(mixed()), SPACE, 15, 2.5, at(12.0)).best
    assert best is not None
    assert (best.trial, best.compression, best.increase_percent) == (2, 4.0, 2.0)  # 3 is over, 4 was stopped
    assert best.map == {"a": "fp16", "b": "int8", "pinned": "fp16"}


LIKELY = st.tuples(
    st.floats(0.5, 8.0), st.floats(-1.0, 8.0), st.floats(0.0, 500.0),
    st.sampled_from([TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]),
)  # fmt: skip


@given(st.lists(LIKELY, min_size=1, max_size=25), st.floats(0.5, 6.0))
def test_the_growth_of_the_hypervolume_equals_computing_it_anew_after_each_trial(
    drawn: list[tuple[float, float, float, TrialState]], budget: float
) -> None:
    trials = [
        made(i, state, compression=compression, increase=increase, start=end / 2, end=end)
        for i, (compression, increase, end, state) in enumerate(drawn)
    ]
    found = standing(study_of(trials), SPACE, 99, budget, at(0)).growth
    order = sorted(trials, key=lambda trial: trial.datetime_complete or START)  # stable, as equal moments are
    areas = [
        hypervolume([point_of(trial, {}) for trial in order[:count]], budget) for count in range(1, len(order) + 1)
    ]
    held = {grown.finished: grown.hypervolume for grown in found}
    shown = 0.0
    for count, area in enumerate(areas, start=1):
        shown = held.get(count, shown)
        assert shown == pytest.approx(area, abs=1e-9)
    first = min(trial.datetime_start for trial in trials if trial.datetime_start)
    for grown in found:
        completed = order[grown.finished - 1].datetime_complete
        assert completed is not None
        assert grown.seconds == (completed - first).total_seconds()


def test_a_step_of_a_launch_shows_how_many_tasks_are_in_which_state() -> None:
    states = {
        name: QueuedTask(state, 0, "", "")
        for name, state in (
            ("7", "COMPLETED"), ("8_0", "RUNNING"), ("8_1", "RUNNING"), ("8_2", "PENDING"), ("80_0", "RUNNING"),
        )
    }  # fmt: skip
    assert queued_jobs({"prepare": "7", "search": "8", "finish": "9"}, states) == {
        "prepare": {"COMPLETED": 1}, "search": {"PENDING": 1, "RUNNING": 2}, "finish": {},
    }  # fmt: skip


def test_the_text_says_what_the_answer_says() -> None:
    jobs = {"prepare": {}, "search": {"RUNNING": 2, "PENDING": 1}}
    text = stood(standing(study_of(mixed()), SPACE, 15, BUDGET, at(74.0), jobs).to_json())
    lines = text.splitlines()
    assert lines[0] == (
        "5 of 15 finished, 1 of them stopped early, 1 running, 1 queued, 3 failed, 1,800 an hour, 0:20 left"
    )
    assert lines[1:3] == ["prepare  over", "search   2 running, 1 pending"]
    assert "12_3    node1      8   1:05" in lines
    assert "   2 failed: interrupted, and tried again" in lines
    assert "best: trial 3, 5.000×, +3.000 %" in lines
    assert lines[-1].split() == ["0:08", "4", f"{hypervolume_of_mixed():.4f}"]


def hypervolume_of_mixed() -> float:
    return hypervolume([point_of(trial, {}) for trial in mixed()[:5]], BUDGET)


def test_the_text_of_a_study_that_has_not_begun_is_one_line() -> None:
    assert stood(empty_standing(5, {}).to_json()) == "0 of 5 finished, 0 running, 0 queued, 0 failed"


def test_a_long_growth_is_shown_in_a_few_lines_with_its_ends() -> None:
    trials = [made(i, compression=2 + i, increase=0.04 * i, start=0, end=60.0 * i) for i in range(100)]
    lines = stood(standing(study_of(trials), SPACE, 100, BUDGET, at(0)).to_json()).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "hypervolume" in line) + 1 :]
    assert len(table) == 8
    assert (table[0].split()[:2], table[-1].split()[:2]) == (["0:00", "1"], ["1:39:00", "100"])


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """A folder with a study whose journal holds the made-up trials; nothing was evaluated."""
    from search.problem.spec import load_spec

    spec = load_spec(write_study(tmp_path))
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    run.write_json(FINGERPRINT, {"space": SPACE})
    opened = connect(choose_storage(spec, run, many=True, say=lambda line: None), run, lambda line: None)
    opened.study.add_trials([trial for trial in mixed() if trial.state != TrialState.RUNNING])
    return tmp_path


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
sys.modules["matplotlib"] = None
sys.argv = ["ssm-mp", *sys.argv[1:]]
from search.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("status", "tiny.toml"), "5 of 64 finished"),
        (("launch", "tiny.toml", "--workers", "3", "--dry-run"), "#SBATCH --array=0-2"),
        (("worker", "tiny.toml", "--set", "search.trials=5"), ""),
    ],
)
def test_a_login_node_needs_no_torch(searched: Path, command: tuple[str, ...], says: str) -> None:
    if command[0] == "worker":  # the one that comes when all is done
        opened = connect_to(searched)
        opened.set_user_attr(ASKED, {"trials": 5, "budget_percent": BUDGET, "asked": 5})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], cwd=searched, env=ENVIRONMENT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "Traceback" not in done.stderr


def connect_to(folder: Path) -> Study:
    from search.trials.storage import read_study

    return read_study(RunDirectory(folder / "runs" / "tiny"))


def test_looking_changes_nothing_in_the_run_directory(searched: Path) -> None:
    run = searched / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = answer("status", "tiny.toml", cwd=searched)
    assert (found["finished"], found["waiting"], found["asked"]) == (5, 1, 64)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_has_not_begun_is_said(tmp_path: Path) -> None:
    write_study(tmp_path)
    assert "no search has been run here yet" in refused("status", "tiny.toml", cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_watching_goes_on_until_the_study_is_finished(searched: Path) -> None:
    log = searched / "watch.log"
    with running("status", "tiny.toml", "--watch", "--set", "search.trials=6", cwd=searched, log=log) as watching:
        wait_until(lambda: "5 of 6 finished" in log.read_text(), log.read_text)
        assert watching.poll() is None
        connect_to(searched).add_trial(made(20, end=20.0))
        assert watching.wait(HUNG) == 0, log.read_text()
    assert "6 of 6 finished" in log.read_text()
    done = ssm_mp("status", "tiny.toml", "--watch", "--json", "--set", "search.trials=6", cwd=searched)
    assert [json.loads(line)["finished"] for line in done.stdout.splitlines()] == [6]
