"""Whether a worker still lives: its lease on its own machine, the queue's word elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from search.slurm.queue import QueuedTask, QueueUnknownError
from search.trials.owner import Owner, dead_owners, lease, owner_from_json, this_process

ROOT = Path(__file__).parents[3]
ELSEWHERE = Owner("elsewhere-1-a", "elsewhere", "n1", 1, "12_3", 1)
"""A Slurm task on another machine, requeued once."""
HOLDER = """
import json, sys, time
from pathlib import Path
from search.trials.owner import lease, this_process
owner = this_process()
with lease(Path(sys.argv[1]), owner):
    print(json.dumps(owner.to_json()), flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Owner]]:
    """Another process that holds its lease, and the owner that it is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, owner_from_json(json.loads(process.stdout.readline()))
        finally:
            process.kill()


States = Callable[[Iterable[str]], dict[str, QueuedTask] | None]


def queue_says(state: str | None, restarts: int = 1) -> States:
    """A queue that has every task it is asked for in one state, or none of them."""
    return lambda jobs: {} if state is None else {job: QueuedTask(state, restarts, "n1", "") for job in jobs}


def no_slurm(jobs: Iterable[str]) -> None:
    """A machine without `squeue`."""


def no_answer(jobs: Iterable[str]) -> dict[str, QueuedTask]:
    """A queue that cannot be asked."""
    raise QueueUnknownError("squeue did not answer")


def never_asked(jobs: Iterable[str]) -> dict[str, QueuedTask]:
    """A queue that must not be needed."""
    raise AssertionError(f"asked for {sorted(jobs)}")


def test_a_process_lives_while_it_holds_its_lease_and_is_dead_once_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, owner):
        assert dead_owners([owner], tmp_path, never_asked) == set()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / owner.lease).exists()
        assert dead_owners([owner], tmp_path, never_asked) == {owner}
    assert dead_owners([owner], tmp_path, never_asked) == {owner}
    assert not (tmp_path / owner.lease).exists()  # swept up


def test_a_lease_ends_with_the_work(tmp_path: Path) -> None:
    owner = this_process()
    with lease(tmp_path / "workers", owner):
        assert dead_owners([owner], tmp_path / "workers", never_asked) == set()
    assert dead_owners([owner], tmp_path / "workers", never_asked) == {owner}
    assert list((tmp_path / "workers").iterdir()) == []


@pytest.mark.parametrize(
    ("state", "restarts", "dead"),
    [
        ("RUNNING", 1, False),
        ("COMPLETING", 1, False),
        ("SUSPENDED", 1, False),
        ("RUNNING", 2, True),  # requeued meanwhile: what runs now is another process
        ("PENDING", 2, True),
        ("PENDING", 1, True),
        ("COMPLETED", 1, True),
        ("FAILED", 1, True),
        ("TIMEOUT", 1, True),
        ("NODE_FAIL", 1, True),
        (None, 0, True),
    ],
)
def test_a_task_on_another_machine_lives_while_the_queue_has_it_running_with_the_same_restart(
    tmp_path: Path, state: str | None, restarts: int, dead: bool
) -> None:
    assert dead_owners([ELSEWHERE], tmp_path, queue_says(state, restarts)) == ({ELSEWHERE} if dead else set())


def test_where_the_queue_cannot_be_asked_its_tasks_count_as_living_and_others_do_not(tmp_path: Path) -> None:
    here = replace(this_process(), job="")
    assert dead_owners([ELSEWHERE, here], tmp_path, no_answer) == {here}


@pytest.mark.parametrize("states", [queue_says("RUNNING"), no_answer, no_slurm])
def test_a_free_lease_on_this_machine_is_dead_whatever_the_queue_says(tmp_path: Path, states: States) -> None:
    task = replace(this_process(), job="12_3", restart=1)
    assert dead_owners([task], tmp_path, states) == {task}


def test_a_held_lease_on_this_machine_does_not_save_a_task_that_the_queue_calls_over(tmp_path: Path) -> None:
    task = replace(this_process(), job="12_3", restart=1)
    with lease(tmp_path, task):
        assert dead_owners([task], tmp_path, queue_says("RUNNING")) == set()
        assert dead_owners([task], tmp_path, queue_says("COMPLETED")) == {task}


def test_without_slurm_leases_decide_about_tasks_elsewhere_too(tmp_path: Path) -> None:
    other = replace(ELSEWHERE, lease="elsewhere-2-b")
    with lease(tmp_path, ELSEWHERE):
        assert dead_owners([ELSEWHERE, other], tmp_path, no_slurm) == {other}


def test_a_worker_outside_slurm_on_another_machine_is_judged_by_its_lease(tmp_path: Path) -> None:
    outside = replace(ELSEWHERE, job="", restart=0)
    assert dead_owners([outside], tmp_path, never_asked) == {outside}
    with lease(tmp_path, outside):
        assert dead_owners([outside], tmp_path, never_asked) == set()


def test_the_queue_is_asked_once_for_all_tasks(tmp_path: Path) -> None:
    asked = []

    def states(jobs: Iterable[str]) -> dict[str, QueuedTask]:
        asked.append(sorted(jobs))
        return {"12_3": QueuedTask("RUNNING", 1, "n1", "")}

    other = replace(ELSEWHERE, lease="elsewhere-2-b", job="12_4")
    assert dead_owners([ELSEWHERE, other], tmp_path, states) == {other}
    assert asked == [["12_3", "12_4"]]


def test_an_owner_is_read_back_as_it_was_written() -> None:
    assert owner_from_json(ELSEWHERE.to_json()) == ELSEWHERE


def test_this_process_is_known_by_its_slurm_task_and_has_a_lease_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    first, second = this_process(), this_process()
    assert (first.name, first.job, first.restart, first.node, first.pid) == ("12_3", "12_3", 2, "n7", os.getpid())
    assert first.lease != second.lease
    monkeypatch.delenv("SLURM_JOB_ID")
    outside = this_process()
    assert (outside.name, outside.job, outside.node) == (f"process {os.getpid()}", "", outside.host)
