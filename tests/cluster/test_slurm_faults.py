"""A search on a real Slurm whose workers are killed, preempted, out of time, or on a node that dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.trials.attributes import OWNER, REASON
from tests.cluster import processes
from tests.cluster.gate import Gate
from tests.cluster.launching import SMALL, Launch, launch, leave_clean
from tests.cluster.private_slurm import PrivateSlurm
from tests.cluster.studying import (
    SEEDS_ONLY,
    finished_count,
    require_exact,
    require_same_as_undisturbed,
    running_owners,
    trials_of,
    write_seeded_study,
)

KILLS = 10


@pytest.fixture
def cluster(slurm: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The private Slurm, left as it was found."""
    yield slurm
    leave_clean(slurm)


def kill_at_random(launched: Launch, gate: Gate, kills: int, moments: random.Random) -> None:
    """Kill so many workers, one of which has a trial in hand, the others whatever they are doing, between trials."""
    launched.wait_at(gate, 1)
    first = moments.choice(gate.standing())
    os.kill(first, signal.SIGKILL)
    killed = {first}
    while len(killed) < kills:
        gate.admit(moments.randint(0, 3))  # fewer in all than would finish the study
        time.sleep(moments.uniform(0.1, 0.6))
        if alive := set(launched.worker_pids()) - killed:  # one that was killed may be seen for a moment
            victim = moments.choice(sorted(alive))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)


def test_ten_kills_at_random_moments_all_workers_of_a_launch_among_them_change_nothing(
    cluster: PrivateSlurm, tmp_path: Path
) -> None:
    write_seeded_study(tmp_path, extra=f"{SMALL}throttle = 4\n")
    moments, gate = random.Random(0), Gate.at(tmp_path / "gate")
    first = launch(cluster, tmp_path, 3, gate)
    kill_at_random(first, gate, 3, moments)
    assert sorted(job.state for job in first.wait()) == ["COMPLETED", "FAILED", "FAILED", "FAILED", "FAILED"]
    assert "the study is not complete" in first.all_logs()
    second = launch(cluster, tmp_path, KILLS, gate)  # more than will die
    kill_at_random(second, gate, KILLS - 3, moments)
    assert finished_count(tmp_path) < SEEDS_ONLY
    gate.open()
    second.wait()
    states = Counter(task.state for task in second.tasks())
    assert states == {"FAILED": KILLS - 3, "COMPLETED": 3}, second.all_logs()
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert 2 <= found.interrupted <= KILLS
    require_same_as_undisturbed(tmp_path)


def test_preempted_workers_give_back_before_they_are_killed_and_come_back(
    cluster: PrivateSlurm, tmp_path: Path
) -> None:
    write_seeded_study(tmp_path, extra=SMALL)
    gate = Gate.at(tmp_path / "gate")
    launched = launch(cluster, tmp_path, 4, gate)
    launched.wait_at(gate, 4)
    urgent = cluster.submit_urgent()
    cluster.wait(lambda jobs: any(job.id == urgent and job.state == "RUNNING" for job in jobs))
    assert running_owners(tmp_path) == []  # the urgent one has all nodes for itself
    assert finished_count(tmp_path) == 0
    gate.open()
    cluster.cancel(urgent)
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    assert [task.restarts for task in launched.tasks()] == [1, 1, 1, 1]
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert (found.given_back, found.interrupted) == (4, 0)
    require_same_as_undisturbed(tmp_path)


def test_a_worker_out_of_time_gives_back_requeues_itself_and_goes_on(cluster: PrivateSlurm, tmp_path: Path) -> None:
    # A warning 50 minutes before the end: of an hour long after the worker has begun, of 50 minutes at once.
    write_seeded_study(tmp_path, extra=SMALL.replace("time = 600", "time = 600\nwarning_seconds = 3000"))
    gate = Gate.at(tmp_path / "gate")
    launched = launch(cluster, tmp_path, 1, gate)
    launched.wait_at(gate, 1)
    cluster.run("scontrol", "update", f"jobid={launched.search}", "timelimit=50")
    processes.wait_until(lambda: launched.tasks()[0].restarts >= 1, launched.all_logs)
    cluster.run("scontrol", "update", f"jobid={launched.search}", "timelimit=600")
    assert finished_count(tmp_path) == 0
    gate.open()
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    (task,) = launched.tasks()
    log = launched.log_of(task).splitlines()
    assert log.count("stopped by SIGUSR1; nothing is lost") == log.count("requeued") == task.restarts
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert found.given_back >= 1
    assert not found.interrupted
    require_same_as_undisturbed(tmp_path)


def test_trials_on_a_node_that_dies_are_taken_over(cluster: PrivateSlurm, tmp_path: Path) -> None:
    write_seeded_study(tmp_path, extra=SMALL)
    gate = Gate.at(tmp_path / "gate")
    launched = launch(cluster, tmp_path, 4, gate)
    owners = launched.wait_at(gate, 4)
    node = owners[0].node
    lost = {owner.job for owner in owners if owner.node == node}
    cluster.node_down(node)
    assert {task.id for task in launched.tasks() if task.restarts} == lost
    cluster.node_up(node)
    gate.open()
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    assert require_exact(tmp_path, SEEDS_ONLY).interrupted == len(lost)
    failed = [trial for trial in trials_of(tmp_path) if REASON in trial.user_attrs]
    assert {trial.user_attrs[OWNER]["node"] for trial in failed} == {node}
    require_same_as_undisturbed(tmp_path)
