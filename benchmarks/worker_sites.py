"""Where workers run while faults are done to them: a private Slurm, or this machine beside a private PostgreSQL.

A site keeps a number of workers at one study, and starts others for those that were killed.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from search.problem.spec import load_spec
from search.slurm.script import render
from search.trials.owner import Owner
from tests.cluster.private_postgres import PrivatePostgres
from tests.cluster.private_slurm import Job, PrivateSlurm
from tests.cluster.processes import wait_until
from tests.cluster.studying import ROOT, STUDY, run_of, started

Fault = Literal["kills", "requeues", "preemptions", "nodes_down", "restarts", "timeouts"]
Owners = Callable[[], list[Owner]]
"""Who has a trial in hand at this moment."""

_AIMING_SECONDS = 1.0
_LEAVING_SECONDS = 90.0


class Site(Protocol):
    """Workers of one study."""

    def fill(self) -> None:
        """Start workers for those that are gone."""

    def inflict(self, fault: Fault, owners: Owners, rng: random.Random) -> list[Owner]:
        """Do one fault to workers that have a trial in hand; returns those that it was meant for."""

    def leave(self) -> None:
        """Wait until the workers have left a finished study. Raises where they do not, or one failed by itself."""


@dataclass(frozen=True)
class LocalSite:
    """Worker processes of this machine, their trials in PostgreSQL. options: of `ssm-mp worker`."""

    folder: Path
    workers: int
    options: Sequence[str]
    server: PrivatePostgres
    _running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _killed: set[int] = field(default_factory=set)

    def fill(self) -> None:
        for pid, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[pid]
                if process.returncode != 0 and pid not in self._killed:
                    ended = f"a worker that nobody killed ended with {process.returncode}"
                    raise RuntimeError(f"{ended}:\n{self._end_of_log()}")
        while len(self._running) < self.workers:
            outside = self.server.environment
            process = started("worker", STUDY, *self.options, cwd=self.folder, log=self._log, environment=outside)
            self._running[process.pid] = process

    def inflict(self, fault: Fault, owners: Owners, rng: random.Random) -> list[Owner]:
        if fault == "restarts":
            hit = owners()
            if hit:
                self.server.restart("immediate")
            return hit
        hit = _kill(rng.choice(held).pid, held) if (held := owners()) else []
        self._killed.update(owner.pid for owner in hit)
        return hit

    def leave(self) -> None:
        wait_until(
            lambda: all(process.poll() is not None for process in self._running.values()),
            lambda: f"expected all workers to leave a finished study: {self._end_of_log()}",
            _LEAVING_SECONDS,
        )

    def _end_of_log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]

    @property
    def _log(self) -> Path:
        return self.folder / "workers.log"


@dataclass(frozen=True)
class SlurmSite:
    """Tasks of arrays on a private Slurm, their trials in a journal; the batch script is the launcher's own."""

    folder: Path
    workers: int
    slurm: PrivateSlurm
    _arrays: list[str] = field(default_factory=list)

    def fill(self) -> None:
        missing = self.workers - len(self._living())
        if missing > 0:
            self._arrays.append(self._submit(missing))

    def inflict(self, fault: Fault, owners: Owners, rng: random.Random) -> list[Owner]:
        held = owners()
        if fault == "kills" and rng.random() < 0.5:
            return self._kill_in_lock(owners)
        if not held:
            return []
        one = rng.choice(held)
        on_node = [owner for owner in held if owner.node == one.node]
        if fault == "kills":
            return _kill(one.pid, held)
        if fault == "requeues":
            self.slurm.run("scontrol", "requeue", one.job, check=False)
            return [one]
        if fault == "nodes_down":
            self.slurm.node_down(one.node)
            self.slurm.node_up(one.node)
            return on_node
        urgent = self.slurm.submit_urgent([one.node])
        self.slurm.wait(lambda jobs: any(job.id == urgent and job.state == "RUNNING" for job in jobs), 120)
        self.slurm.cancel(urgent)
        return on_node

    def leave(self) -> None:
        self.slurm.wait(lambda jobs: not self._living(jobs), _LEAVING_SECONDS)
        for log in sorted((run_of(self.folder) / "logs").glob("*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            if "Traceback" in text or any(line.startswith("error: ") for line in text.splitlines()):
                raise RuntimeError(f"a worker that nobody killed failed: {text[-2000:]}")

    def _living(self, jobs: Sequence[Job] | None = None) -> list[Job]:
        every = self.slurm.jobs() if jobs is None else jobs
        return [job for job in every if job.among(self._arrays) and not job.ended]

    def _submit(self, count: int) -> str:
        """An array of workers, submitted as `ssm-mp launch` does it; its job id."""
        run = run_of(self.folder)
        logs = run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -P -m search.cli"
        section = load_spec(self.folder / STUDY).slurm
        script = run / f"search-{count}.sbatch"
        script.write_text(render("search", section, command=command, workers=count, logs=str(logs)), encoding="utf-8")
        where = ["--parsable", f"--chdir={self.folder}"]
        return self.slurm.run("sbatch", *where, str(script), STUDY).strip()

    def _kill_in_lock(self, owners: Owners) -> list[Owner]:
        """Kill the worker that holds the study's lock, which is within claim or tell."""
        path = run_of(self.folder) / "locks" / "claims"
        known = {owner.pid: owner for owner in owners()}
        end = time.monotonic() + _AIMING_SECONDS
        while time.monotonic() < end:
            holder = lock_holder(path)
            if holder in known:
                return _kill(holder, known.values())
            time.sleep(0.0005)
        return []


def _kill(pid: int, owners: Iterable[Owner]) -> list[Owner]:
    """SIGKILL; the owner that was killed, nobody where it had ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return []
    return [owner for owner in owners if owner.pid == pid]


def lock_holder(path: Path) -> int | None:
    """The process that holds the `flock` of a file, as /proc/locks has it."""
    inode = str(path.stat().st_ino)
    for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
            return int(fields[4])
    return None
