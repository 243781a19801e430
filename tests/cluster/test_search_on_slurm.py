"""A search on a real Slurm: launched, watched, cancelled, launched again; also by hand."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.run.launch import FAILED
from ssm_mp import load_artifact
from tests.cluster.gate import Gate
from tests.cluster.launching import DATED, SMALL, launch, leave_clean, submit_by_hand
from tests.cluster.private_slurm import PrivateSlurm
from tests.cluster.processes import wait_until
from tests.cluster.slurm_config import NODES
from tests.cluster.studying import (
    ENVIRONMENT,
    SEEDS_ONLY,
    STUDY,
    answer,
    finished_count,
    only_error,
    refused,
    require_exact,
    require_same_as_undisturbed,
    run_of,
    ssm_mp,
    write_seeded_study,
)
from tests.tiny import write_checkpoint


@pytest.fixture
def cluster(slurm: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The private Slurm, left as it was found."""
    yield slurm
    leave_clean(slurm)


@pytest.fixture
def login_node(tmp_path: Path) -> dict[str, str]:
    """Variables of a machine where importing torch fails."""
    folder = tmp_path / "without" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('raise ImportError("a login node has no torch")\n')
    return {"PYTHONPATH": os.pathsep.join([str(folder.parent), ENVIRONMENT["PYTHONPATH"]])}


def test_eight_workers_give_exactly_41_trials_an_artifact_and_the_front_of_one_process(
    cluster: PrivateSlurm, tmp_path: Path
) -> None:
    write_seeded_study(tmp_path, extra=SMALL)
    launched = launch(cluster, tmp_path, workers=8)
    jobs = launched.wait()
    assert {job.state for job in jobs} == {"COMPLETED"}, launched.all_logs()
    assert len(jobs) == 1 + 8 + 1
    assert all(launched.log_of(job) for job in jobs)
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert not found.reasons
    load_artifact(run_of(tmp_path) / "winner")
    assert "## Certificate" in (run_of(tmp_path) / "report.md").read_text()
    require_same_as_undisturbed(tmp_path)


def test_a_running_search_tells_a_login_node_who_works_where_and_refuses_a_second_launch_until_it_is_cancelled(
    cluster: PrivateSlurm, tmp_path: Path, login_node: dict[str, str]
) -> None:
    write_seeded_study(tmp_path, extra=SMALL)
    gate = Gate.at(tmp_path / "gate")
    gate.admit(3)
    first = launch(cluster, tmp_path, 4, gate)
    wait_until(lambda: finished_count(tmp_path) == 3, first.all_logs)
    assert len(first.wait_at(gate, 4)) == 4
    on_login_node = {**cluster.environment, **login_node}
    seen = answer("status", STUDY, cwd=tmp_path, environment=on_login_node)
    assert (seen["asked"], seen["finished"]) == (SEEDS_ONLY, 3)
    assert sorted(row["worker"] for row in seen["running"]) == [f"{first.search}_{number}" for number in range(4)]
    assert {row["node"] for row in seen["running"]} <= set(NODES)
    assert seen["jobs"] == {"prepare": {"COMPLETED": 1}, "search": {"RUNNING": 4}, "finish": {"PENDING": 1}}
    error = refused("launch", STUDY, "--workers", 4, cwd=tmp_path, environment=on_login_node)
    assert "launched already" in error
    assert f"scancel {' '.join(first.jobs.values())}" in error
    cluster.cancel(*first.jobs.values())
    assert Counter(job.state for job in first.wait()) == {"COMPLETED": 1, "CANCELLED": 5}
    assert finished_count(tmp_path) == 3
    second = launch(cluster, tmp_path, 4)
    assert {job.state for job in second.wait()} == {"COMPLETED"}, second.all_logs()
    require_exact(tmp_path, SEEDS_ONLY)
    require_same_as_undisturbed(tmp_path)


def test_a_failed_preparation_ends_every_step_with_its_error_and_a_launch_after_mending_works(
    cluster: PrivateSlurm, tmp_path: Path
) -> None:
    write_seeded_study(tmp_path, windows=64, trials=4, extra=SMALL)
    (tmp_path / "model.safetensors").unlink()
    failing = launch(cluster, tmp_path, workers=3)
    prepare, *others = sorted(failing.wait(), key=lambda job: job.raw_id)
    assert len(others) == 3 + 1
    reason = only_error(failing.log_of(prepare)).removeprefix("error: ")
    assert "no checkpoint at" in reason
    for job in (prepare, *others):
        assert job.state == "FAILED"
        assert reason in only_error(failing.log_of(job))
    write_checkpoint(tmp_path / "model.safetensors")
    mended = launch(cluster, tmp_path, workers=2)
    assert {job.state for job in mended.wait()} == {"COMPLETED"}, mended.all_logs()
    assert not (run_of(tmp_path) / FAILED).exists()
    require_exact(tmp_path, 4)


def test_the_script_submitted_by_hand_ends_with_a_finished_study(cluster: PrivateSlurm, tmp_path: Path) -> None:
    write_seeded_study(tmp_path, windows=256, trials=8)
    gate = Gate.at(tmp_path / "gate")
    array = submit_by_hand(cluster, tmp_path, gate, "--array=0-2")
    gate.wait_for(3, lambda: str(cluster.jobs()))  # or one might be done before another begins
    gate.open()
    jobs = cluster.wait([array])
    logs = {job.id: (tmp_path / f"ssm-mp-search-{job.id}.log").read_text() for job in jobs}
    assert [job.state for job in jobs] == ["COMPLETED"] * 3, logs
    require_exact(tmp_path, 8)
    load_artifact(run_of(tmp_path) / "winner")
    assert (run_of(tmp_path) / "report.md").exists()
    assert sum("report.md, with plots" in log for log in logs.values()) == 1
    assert all(DATED.search(log) for log in logs.values()), logs


def test_a_dry_run_needs_neither_slurm_nor_torch_and_leaves_nothing(tmp_path: Path, login_node: dict[str, str]) -> None:
    write_seeded_study(tmp_path, windows=64)
    bare = {**login_node, "PATH": str(tmp_path / "empty")}
    done = ssm_mp("launch", STUDY, "--workers", 8, "--dry-run", cwd=tmp_path, environment=bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 3
    assert "#SBATCH --array=0-7\n" in done.stdout
    assert "--dependency=afterany:$prepare" in done.stdout
    assert not (tmp_path / "runs").exists()
    without = refused("launch", STUDY, cwd=tmp_path, environment=bare, code=3)
    assert "no sbatch on PATH" in without
