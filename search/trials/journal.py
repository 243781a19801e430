"""Optuna's journal file, made to survive what happens on a shared folder.

Two things differ from Optuna's own backend: the lock is the kernel's, so a killed holder never makes others wait,
and what a killed or a full disk left half written is cut off before the next line, and waited for, not tripped over.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from search.base.file_lock import FileLock
from search.trials.optuna_storage import known_offset
from ssm_mp.errors import MachineError

PATIENCE = 900.0
"""Seconds that a full folder or a restarting database is waited for before a worker gives up."""

_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Failures of a shared folder that go away: full, over quota, a server that restarts."""


class Journal(JournalFileBackend):
    """The journal file, appended to whole lines at a time under `FileLock`."""

    def __init__(self, path: Path, lock: FileLock, say: Callable[[str], None], patience: float = PATIENCE) -> None:
        super().__init__(str(path))
        self._path = path
        self._append_lock = lock
        self._kept: list[dict[str, Any]] | None = None
        self._deferred, self._unsettled = False, False
        self._say = say
        self._patience = patience

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is appended within as one piece at the end: all of it or nothing."""
        self._kept = []
        try:
            yield
            kept, self._kept = self._kept, None
            self.append_logs(kept)
        finally:
            self._kept = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Wait for the disk once, at the end, for all that is appended within."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            if self._unsettled:
                self._settle()

    def _settle(self) -> None:
        """See what was appended on the disk, where it outlives a loss of power."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        self._unsettled = False

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The whole lines; under the lock, for what a full disk takes back must never have been seen."""
        known = known_offset(self, log_number_from)
        with self._path.open("rb") as file:  # over NFS, a size is true only of a file that was just opened
            if os.fstat(file.fileno()).st_size == known:
                return
        with self._append_lock.held():
            lines = list(super().read_logs(log_number_from))
        yield from lines

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines, all of them or none; a folder that is full for a while is waited for."""
        if self._kept is not None:
            self._kept += logs
            return
        data = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        deadline, told = time.monotonic() + self._patience, False
        while True:
            try:
                with self._append_lock.held():
                    _append_whole(self._path, data)
                self._unsettled = True
                if not self._deferred:
                    self._settle()
                return
            except OSError as error:
                if error.errno not in _PASSING or time.monotonic() > deadline:
                    raise MachineError(
                        f"{self._path}: the journal cannot be written ({error.strerror}); nothing of this study is "
                        "lost: mend that, and start the same command again"
                    ) from None
                if not told:
                    self._say(f"{self._path}: {error.strerror}; waiting for up to {self._patience:.0f} s")
                    told = True
            time.sleep(min(1.0, self._patience / 20))


def _append_whole(path: Path, data: bytes) -> None:
    """Append under the lock: cut off a half-written last line first, and leave none behind."""
    with path.open("r+b", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        file.seek(end)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(end)  # frees space, so it works on a full disk
            raise


def _end_of_lines(file: Any, block: int = 4096) -> int:
    """Offset behind the last newline of a file."""
    at: int = file.seek(0, os.SEEK_END)
    while at > 0:
        begin = max(0, at - block)
        file.seek(begin)
        newline = file.read(at - begin).rfind(b"\n")
        if newline >= 0:
            return begin + int(newline) + 1
        at = begin
    return 0
