"""Launches on the private Slurm: submitted as a user does, waited for, and read while they run."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from search.trials.owner import Owner
from tests.cluster import processes
from tests.cluster.gate import Gate
from tests.cluster.private_slurm import Job, PrivateSlurm
from tests.cluster.studying import COMMAND, ENVIRONMENT, ROOT, STUDY, answer, run_of, running_owners

SMALL = """
[slurm]
cpus_per_task = 1
mem = "900M"
time = 600
"""
"""What a test's job asks of Slurm: sixteen fit at once. Partition and GPU are the defaults."""
BY_HAND = ("--cpus-per-task=1", "--mem=900M", "--time=600")
"""The same for sbatch itself."""
DATED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", re.MULTILINE)
"""The time before lines of a log."""
_LOOK_EVERY = 0.3
"""Seconds between two looks, so that looking takes nothing from the workers, which share the machine."""


@dataclass(frozen=True)
class Launch:
    """One launch of the study in `folder`: its jobs by step, and where its logs are."""

    slurm: PrivateSlurm
    folder: Path
    jobs: Mapping[str, str]
    logs: Path

    @property
    def search(self) -> str:
        """The id of the worker array."""
        return self.jobs["search"]

    def tasks(self) -> list[Job]:
        """The worker array as it stands."""
        return [job for job in self.slurm.jobs() if job.among([self.search])]

    def wait(self) -> list[Job]:
        """All jobs, once they have ended."""
        seen: list[Job] = []

        def over() -> bool:
            seen[:] = [job for job in self.slurm.jobs() if job.among(self.jobs.values())]
            return all(job.ended for job in seen)

        processes.wait_until(over, lambda: f"expected all to end: {seen}\n{self.all_logs()}", every=_LOOK_EVERY)
        return seen

    def wait_at(self, gate: Gate, count: int) -> list[Owner]:
        """The owners of the trials that wait at the gate, once there are so many."""
        standing = gate.wait_for(count, self.all_logs)
        return [owner for owner in running_owners(self.folder) if owner.pid in standing]

    def worker_pids(self) -> list[int]:
        """The worker processes, without what is still a shell and without what they have started."""
        living, own = processes.living(), self.slurm.pids(self.search)
        return [pid for pid in own if pid in living and "/ssm_mp/start.py worker " in living[pid].command]

    def log_of(self, job: Job) -> str:
        """What one job or task wrote, without the times that lines have in jobs of Slurm."""
        (found,) = self.logs.glob(f"ssm-mp-*-{job.id}.log")
        return DATED.sub("", found.read_text())

    def all_logs(self) -> str:
        """The end of every log, for the message of a test that fails."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-600:]}" for log in sorted(self.logs.glob("*.log")))


def launch(slurm: PrivateSlurm, folder: Path, workers: int, gate: Gate | None = None) -> Launch:
    """Launch the study in a folder; its trials wait at the gate, where there is one."""
    environment = {**slurm.environment, **(gate.environment if gate else {})}  # a job has that of its submission
    found = answer("launch", STUDY, "--workers", workers, cwd=folder, environment=environment)
    assert found["workers"] == workers
    assert (folder / found["logs"]).resolve() == (run_of(folder) / "logs").resolve()
    return Launch(slurm, folder, found["jobs"], folder / found["logs"])


def submit_by_hand(slurm: PrivateSlurm, folder: Path, gate: Gate, *options: str) -> str:
    """`sbatch jobs/search.sbatch STUDY`, typed in the folder of the study; returns the array's id."""
    own = {"OMP_NUM_THREADS": ENVIRONMENT["OMP_NUM_THREADS"], **gate.environment}
    variables = [f"{name}={value}" for name, value in own.items()]
    command = f"SSM_MP={sys.executable} {' '.join(COMMAND[1:])}"
    sbatch = ["sbatch", "--parsable", *BY_HAND, *options, str(ROOT / "jobs" / "search.sbatch"), STUDY]
    return slurm.run("env", f"--chdir={folder}", *variables, command, *sbatch).strip()


def leave_clean(slurm: PrivateSlurm) -> None:
    """End every job and bring back every node."""
    slurm.cancel_all()
    for name, state in slurm.node_states().items():
        if state.startswith("down"):
            slurm.node_up(name)
