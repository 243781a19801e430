"""Writers of an artifact folder that are killed before each step that changes a disk. Needs no torch.

`python -m tests.ssm_mp.killed_writers FOLDER`: for n = 0, 1, … a copy `FOLDER/case-n` of `FOLDER/template`, in which a
writer that puts `FOLDER/new` at `artifact` was killed before its change n + 1; the last one lived. With a second
number of changes, a writer that was killed after those is gone on from, and killed as well.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssm_mp.artifact_folder import write_folder

CHANGES = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "chmod")


def main(folder: Path, before: int | None) -> None:
    for n in itertools.count():
        case = folder / f"case-{n}"
        shutil.copytree(folder / "template", case, symlinks=True)
        if before is not None:
            _writer(case, folder / "new", before)
        if _writer(case, folder / "new", n) == 0:
            return


def _writer(case: Path, new: Path, changes: int) -> int:
    """Put `new` at `case/artifact` in a process that is killed after so many changes; its exit status."""
    child = os.fork()
    if child == 0:
        for name in CHANGES:
            setattr(os, name, _Deadly(getattr(os, name), [changes] if name == CHANGES[0] else _counter()))
        try:
            write_folder(case / "artifact", lambda partial: _fill(partial, new), replace=True)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a writer ended with status {status}")
    return status


def _counter() -> list[int]:
    """What is left of the changes, shared by all of them."""
    first: Any = getattr(os, CHANGES[0])
    left: list[int] = first.left
    return left


class _Deadly:
    """A call that kills the process when no changes are left."""

    def __init__(self, call: Callable[..., Any], left: list[int]) -> None:
        self.call, self.left = call, left

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left[0] -= 1
        return self.call(*arguments, **named)


def _fill(partial: Path, new: Path) -> None:
    for file in new.iterdir():
        (partial / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
