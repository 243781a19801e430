"""A lock that survives killed holders."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssm_mp.errors import MachineError


class FileLock:
    """An exclusive `flock`: held by one process at a time, let go by the kernel when its holder dies.

    Works over NFS (version 4, or 3 with lockd) and on local disks; a shared folder without it raises MachineError.
    Threads of one process exclude each other too. Not reentrant.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock and hold it."""
        with self._threads, self._open() as descriptor:
            _flock(descriptor, fcntl.LOCK_EX, self._path)
            yield  # closing the file lets go

    @contextmanager
    def tried(self) -> Iterator[bool]:
        """Hold the lock if it is free; tells whether."""
        if not self._threads.acquire(blocking=False):
            yield False
            return
        try:
            with self._open() as descriptor:
                yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, self._path)
        finally:
            self._threads.release()

    @contextmanager
    def awaited(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the lock and hold it; `check` is called meanwhile, and may raise."""
        while True:
            with self.tried() as got:
                if got:
                    yield
                    return
            check()
            time.sleep(0.1)

    @contextmanager
    def _open(self) -> Iterator[int]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _flock(descriptor: int, operation: int, path: Path) -> bool:
    """Whether the lock was got. Raises MachineError where the folder has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise MachineError(
            f"{path}: this folder has no file locks ({error}); many workers need them: use a folder on NFS 4 or a "
            'file system mounted with flock, or [storage] kind = "postgresql"'
        ) from None
    return True
