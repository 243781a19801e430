"""What Slurm's queue says of jobs and array tasks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from search.slurm.programs import ASK_SECONDS, asked, last_words
from ssm_mp.errors import MachineError


@dataclass(frozen=True)
class QueuedTask:
    """One job or array task as the queue has it. `state` is Slurm's word in full, such as RUNNING."""

    state: str
    restarts: int
    node: str
    reason: str


class QueueUnknownError(MachineError):
    """There is a Slurm, but its queue cannot be asked at the moment."""


_COLUMNS = {
    "ArrayJobID": 32,
    "ArrayTaskID": 24,
    "JobID": 32,
    "State": 24,
    "RestartCnt": 12,
    "NodeList": 64,
    "Reason": 80,
}


def queue_states(job_ids: Iterable[str]) -> dict[str, QueuedTask] | None:
    """The queue's word on jobs (`12`) and array tasks (`12_3`); an array job's id stands for all of its tasks.

    Keys are `12_3` for array tasks and `12` for others; what the queue no longer knows is missing. None where this
    machine has no `squeue`. Raises QueueUnknownError where it has one that does not answer.
    """
    ids = sorted({job.partition("_")[0] for job in job_ids})
    if not ids:
        return {}
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    try:
        answer = asked(["squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-O", columns], ASK_SECONDS)
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        raise QueueUnknownError(f"squeue did not answer within {ASK_SECONDS:.0f} s; try again later") from None
    if answer.returncode == 0:
        return dict(_queued(answer.stdout))
    words = last_words(answer.stderr)
    if "Invalid job id" not in words:
        raise QueueUnknownError(f"squeue failed (exit {answer.returncode}: {words}); try again later")
    if len(ids) == 1:
        return {}
    found = [queue_states([one]) or {} for one in ids]  # one unknown id must not make the others look gone
    return {task: state for states in found for task, state in states.items()}


def _queued(listing: str) -> Iterator[tuple[str, QueuedTask]]:
    """The rows of `squeue -O` with `_COLUMNS`."""
    for line in listing.splitlines():
        cells, start = [], 0
        for width in _COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        array, task, job, state, restarts, node, reason = cells
        if job.isdecimal() and state:
            name = f"{array}_{task}" if task.isdecimal() else job
            yield name, QueuedTask(state, int(restarts) if restarts.isdecimal() else 0, node, reason)
