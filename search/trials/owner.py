"""Who works on a trial, and whether that worker still lives.

A process lives while it holds the lock of its lease, a file in the run directory that the kernel lets go of when the
process dies, however it dies. Of Slurm tasks on other machines `squeue` is asked instead: locks of a machine that is
down may stay.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.base.file_lock import FileLock
from search.slurm.queue import QueuedTask, QueueUnknownError, queue_states
from search.slurm.task import owner_of_this_task

LEASES = "workers"
"""Folder of leases in a run directory."""

_LIVING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING"})
"""Slurm's states of a task whose processes may still be there."""


@dataclass(frozen=True)
class Owner:
    """A worker process. `job` is its Slurm task (`12_3`), empty outside Slurm; `restart` counts its requeues.

    lease: name of the file whose lock it holds, another one for every process.
    """

    lease: str
    host: str
    node: str
    pid: int
    job: str = ""
    restart: int = 0

    @property
    def name(self) -> str:
        """What people call it."""
        return self.job or f"process {self.pid}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def owner_from_json(values: Mapping[str, Any]) -> Owner:
    """Inverse of `Owner.to_json`."""
    return Owner(**values)


def this_process() -> Owner:
    """The worker that this process is."""
    task = owner_of_this_task(os.environ)
    host = _this_host()
    name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
    if task is None:
        return Owner(name, host, host, os.getpid())
    return Owner(name, host, task.node or host, os.getpid(), task.job, task.restart)


@contextmanager
def lease(folder: Path, owner: Owner) -> Iterator[None]:
    """Hold an owner's lease while its process works."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / owner.lease
    with FileLock(path).held():
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def dead_owners(
    owners: Iterable[Owner],
    folder: Path,
    states: Callable[[Iterable[str]], dict[str, QueuedTask] | None] = queue_states,
) -> set[Owner]:
    """Those of `owners` that are certainly gone. Where the queue cannot be asked, its tasks count as living."""
    everyone = set(owners)
    # a lease is certain on its own machine, and all there is to ask about a worker outside Slurm
    leased = {owner for owner in everyone if not owner.job or owner.host == _this_host()}
    gone = {owner for owner in leased if not _lease_held(folder, owner)}
    tasks = {owner for owner in everyone if owner.job} - gone
    if not tasks:
        return gone
    try:
        queued = states({owner.job for owner in tasks})
    except QueueUnknownError:
        return gone
    if queued is None:  # no Slurm on this machine, such as a copy of the run directory
        return gone | {owner for owner in tasks if not _lease_held(folder, owner)}
    return gone | {owner for owner in tasks if not _queued_alive(owner, queued.get(owner.job))}


def living_leases(folder: Path) -> list[str]:
    """Names of the leases that some process holds now; none is removed, for it may be about to be held."""
    return sorted(path.name for path in folder.glob("*") if _locked(path))


def _this_host() -> str:
    return socket.gethostname().split(".")[0]


def _queued_alive(owner: Owner, task: QueuedTask | None) -> bool:
    return task is not None and task.state in _LIVING and task.restarts == owner.restart


def _locked(path: Path) -> bool:
    with FileLock(path).tried() as got:
        return not got


def _lease_held(folder: Path, owner: Owner) -> bool:
    path = folder / owner.lease
    if not path.exists():
        return False
    with FileLock(path).tried() as got:
        if got:
            path.unlink(missing_ok=True)
        return not got
