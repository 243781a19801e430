"""The job or array task that a process runs in, and putting it back into the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from search.slurm.programs import problem


@dataclass(frozen=True)
class SlurmTask:
    """The job or array task that a process runs in. `raw` is the job id without array, as `scontrol` lists it."""

    job: str
    restart: int
    node: str
    raw: str


def owner_of_this_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """The Slurm task of a process with this environment; None outside Slurm."""
    raw = environ.get("SLURM_JOB_ID", "")
    if not raw:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
    job = f"{array}_{task}" if array and task else raw
    return SlurmTask(job, int(environ.get("SLURM_RESTART_COUNT") or 0), environ.get("SLURMD_NODENAME", ""), raw)


def requeue(job: str) -> str | None:
    """Put a running job or array task (`12_3`) back into the queue; the reason where Slurm does not."""
    return problem(["scontrol", "requeue", job])
