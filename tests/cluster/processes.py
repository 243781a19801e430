"""The processes that belong to one private directory: found through /proc, and killed; free ports; waiting.

Daemons and jobs leave their process group and their parent, so neither says whose they are. A process belongs to a
directory if its command line, its environment or its working folder lies in that directory, or its parent belongs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Below the ports that the kernel gives to outgoing connections.
PORTS = range(10_000, 32_000)
HUNG = 900.0
"""Seconds after which what a test waits for is given up: far more than it can take, only to end a test that hangs."""

Explain = Callable[[], str]
"""What a test that waited in vain says."""


@dataclass(frozen=True)
class Process:
    """One living process, as /proc showed it."""

    pid: int
    parent: int
    command: str
    environment: frozenset[str]
    folder: str

    def mentions(self, directory: Path) -> bool:
        """Whether its command line, environment or working folder lies in `directory`."""
        inside = f"{directory}/"
        return (
            inside in self.command or f"{self.folder}/".startswith(inside) or any(inside in e for e in self.environment)
        )


def living() -> dict[int, Process]:
    """Every process that is not a zombie, by its number."""
    found = {}
    for entry in Path("/proc").iterdir():
        # A process may end while it is being read.
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                process = _read(entry)
                if process is not None:
                    found[process.pid] = process
    return found


def of_directory(directory: Path) -> list[Process]:
    """Every process that belongs to `directory`, without this one and its ancestors."""
    everything = living()
    own = _ancestors(everything, os.getpid())
    roots = [p.pid for p in everything.values() if p.mentions(directory) and p.pid not in own]
    return [p for p in with_descendants(everything, roots) if p.pid not in own]


def with_descendants(everything: dict[int, Process], roots: Iterable[int]) -> list[Process]:
    """The processes `roots` and all below them, by number."""
    children: dict[int, list[int]] = {}
    for process in everything.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return [everything[pid] for pid in sorted(found) if pid in everything]


def kill_all(find: Callable[[], list[Process]], timeout: float = HUNG) -> None:
    """Kills what `find` returns, in its order, again and again until it returns nothing."""
    end = time.monotonic() + timeout
    while left := find():
        if time.monotonic() > end:
            names = ", ".join(f"{p.pid} ({p.command})" for p in left)
            raise TimeoutError(f"expected every process to end within {timeout:g} s of SIGKILL; still there: {names}")
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def remove(directory: Path) -> None:
    """Kills every process of `directory` and removes it."""
    kill_all(lambda: of_directory(directory))
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        # Something wrote while the folder was being removed, and has ended by now; or another test run removes it too.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)


@contextlib.contextmanager
def private_directory(kind: str) -> Iterator[Path]:
    """A new folder with a short path (sockets allow 108 characters), removed with all its processes at the end.

    Folders of the same kind whose owner was killed before it could tidy up are removed first.
    """
    top = Path(tempfile.gettempdir())
    for abandoned in top.glob(f"{kind}-*-*"):
        owner = abandoned.name.split("-")[-2]
        if owner.isdigit() and not Path("/proc", owner).exists():
            remove(abandoned)
    directory = Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=top))
    try:
        yield directory
    finally:
        remove(directory)


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """As many different TCP ports that nobody listens on, and that no other test run gets as long as this holds them.

    Each is reserved by a Unix socket without a file that is named after it: one process of a machine can have that, and
    the kernel lets go of it when the process ends, however it ends.
    """
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with contextlib.ExitStack() as tried, contextlib.suppress(OSError):
                name = tried.enter_context(socket.socket(socket.AF_UNIX))
                name.bind(f"\0ssm-mp-test-port-{port}")
                with socket.socket() as probe:
                    probe.bind(("", port))
                held.enter_context(tried.pop_all())
                found.append(port)
            if len(found) == count:
                break
        else:
            raise OSError(f"expected {count} free TCP ports in {PORTS.start}–{PORTS.stop - 1}, found {len(found)}")
        yield found


def wait_until(condition: Callable[[], bool], explain: Explain, timeout: float = HUNG, every: float = 0.1) -> None:
    """Returns once `condition` holds; after `timeout` seconds raises TimeoutError with what `explain` says."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout:g} s: {explain()}")
        time.sleep(every)


def _read(entry: Path) -> Process | None:
    # After the last bracket, because the name in brackets may hold anything.
    state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    if state in "ZX":
        return None
    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    environment: frozenset[str] = frozenset()
    folder = ""
    # Those of another user's process are not readable.
    with contextlib.suppress(OSError):
        environment = frozenset((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
        folder = str((entry / "cwd").readlink())
    return Process(int(entry.name), int(parent), command, environment, folder)


def _ancestors(everything: dict[int, Process], pid: int) -> set[int]:
    found: set[int] = set()
    while pid in everything and pid not in found:
        found.add(pid)
        pid = everything[pid].parent
    return found
