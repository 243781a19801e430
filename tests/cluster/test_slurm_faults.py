"""A search on a real Slurm whose workers are killed, preempted, out of time, or on a node that dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.measured import OWNER, REASON
from tests.cluster import processes
from tests.cluster.launching import SMALL, Launch, launch, leave_clean
from tests.cluster.private_slurm import PrivateSlurm
from tests.cluster.studying import (
    SEEDS_ONLY,
    finished_count,
    require_exact,
    require_same_as_undisturbed,
    running_owners,
    trials_of,
    write_long_study,
)

KILLS = 10
GIVEN_BACK_SECONDS = 10


@pytest.fixture
def cluster(slurm: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The private Slurm, left as it was found."""
    yield slurm
    leave_clean(slurm)


def kill_at_random(launched: Launch, most: int, moments: random.Random) -> int:
    """Kill workers, whatever they are doing, until so many are dead or all have ended; returns how many."""
    kills = 0
    while kills < most and not all(task.ended for task in launched.tasks()):
        time.sleep(moments.uniform(0.1, 0.6))
        if alive := launched.worker_pids():
            os.kill(moments.choice(alive), signal.SIGKILL)
            kills += 1
    return kills


def is_warned(pid: int) -> bool:
    """Whether SIGUSR1 waits for a process that is stopped, or came before that, and the process has left."""
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except FileNotFoundError:
        return True
    (pending,) = (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_ten_kills_at_random_moments_all_workers_of_a_launch_among_them_change_nothing(
    cluster: PrivateSlurm, tmp_path: Path
) -> None:
    write_long_study(tmp_path, extra=f"{SMALL}throttle = 4\n")
    moments = random.Random(0)
    first = launch(cluster, tmp_path, workers=3)
    first.wait_for_running(1)
    kills = kill_at_random(first, 3, moments)
    assert sorted(job.state for job in first.wait()) == ["COMPLETED", "FAILED", "FAILED", "FAILED", "FAILED"]
    assert "the study is not complete" in first.all_logs()
    second = launch(cluster, tmp_path, workers=10)  # more than will die
    second.wait_for_running(1)
    kills += kill_at_random(second, KILLS - kills, moments)
    assert kills == KILLS, second.all_logs()
    second.wait()
    states = Counter(task.state for task in second.tasks())
    assert states == {"FAILED": KILLS - 3, "COMPLETED": 3}, second.all_logs()
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert 1 <= found.interrupted <= KILLS
    require_same_as_undisturbed(tmp_path)


def test_preempted_workers_give_back_within_seconds_and_come_back(cluster: PrivateSlurm, tmp_path: Path) -> None:
    write_long_study(tmp_path, extra=SMALL)
    launched = launch(cluster, tmp_path, workers=4)
    launched.wait_for_running(4)
    urgent = cluster.submit_urgent()
    processes.wait_until(
        lambda: not running_owners(tmp_path), GIVEN_BACK_SECONDS, lambda: str(running_owners(tmp_path))
    )
    cluster.wait(lambda jobs: any(job.id == urgent and job.state == "RUNNING" for job in jobs))
    assert finished_count(tmp_path) < SEEDS_ONLY
    cluster.cancel(urgent)
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    assert [task.restarts for task in launched.tasks()] == [1, 1, 1, 1]
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert found.given_back >= 1
    assert not found.interrupted
    require_same_as_undisturbed(tmp_path)


def test_a_worker_out_of_time_gives_back_requeues_itself_and_goes_on(cluster: PrivateSlurm, tmp_path: Path) -> None:
    # The controller looks every 30 s, so a warning 30 s before the end of a minute comes within the first 30 s.
    write_long_study(tmp_path, extra=SMALL.replace("time = 10", "time = 1\nwarning_seconds = 30"))
    launched = launch(cluster, tmp_path, workers=1)
    launched.wait_for_running(1)
    (pid,) = launched.worker_pids()
    os.kill(pid, signal.SIGSTOP)  # or the study might be finished before the warning
    processes.wait_until(lambda: is_warned(pid), 45, launched.all_logs)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    processes.wait_until(lambda: launched.tasks()[0].restarts >= 1, GIVEN_BACK_SECONDS, launched.all_logs)
    assert not running_owners(tmp_path)
    assert finished_count(tmp_path) < SEEDS_ONLY
    cluster.run("scontrol", "update", f"jobid={launched.search}", "timelimit=10")
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    (task,) = launched.tasks()
    log = launched.log_of(task).splitlines()
    assert log.count("stopped by SIGUSR1; nothing is lost") == log.count("requeued") == task.restarts
    assert not require_exact(tmp_path, SEEDS_ONLY).interrupted
    require_same_as_undisturbed(tmp_path)


def test_trials_on_a_node_that_dies_are_taken_over(cluster: PrivateSlurm, tmp_path: Path) -> None:
    write_long_study(tmp_path, extra=SMALL)
    launched = launch(cluster, tmp_path, workers=4)
    owners = launched.wait_for_running(3)
    node = owners[0].node
    cluster.node_down(node)
    requeued = {task.id for task in launched.tasks() if task.restarts}
    assert requeued >= {owner.job for owner in owners if owner.node == node}
    cluster.node_up(node)
    assert {job.state for job in launched.wait()} == {"COMPLETED"}, launched.all_logs()
    found = require_exact(tmp_path, SEEDS_ONLY)
    assert found.interrupted >= 1
    lost = [trial for trial in trials_of(tmp_path) if REASON in trial.user_attrs]
    assert {trial.user_attrs[OWNER]["node"] for trial in lost} == {node}
    require_same_as_undisturbed(tmp_path)
