"""A study's preparation that is killed at each of its steps and begun again.

`python -m tests.search.run.killed_preparations STUDY FOLDER PROBE`: prepares in `FOLDER/whole` undisturbed; then in
`FOLDER/killed`, by processes of which each writes one file and is killed, by SIGKILL, when it is about to write the
next, until one lives. Prints how many files the first has written, and how many processes the second took.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from search.measure import backward
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.run.prepare import prepare


def main(study: Path, folder: Path, probe: str) -> None:
    torch.set_num_threads(1)
    backward._CHUNK = 3
    spec = load_spec(study, [f"search.probe={probe}"])
    written = _prepared(lambda: prepare(spec, RunDirectory(folder / "whole"), _quiet), None)
    processes = 1
    while _prepared(lambda: prepare(spec, RunDirectory(folder / "killed"), _quiet), 1) is None:
        processes += 1
        if processes > 1000:
            raise SystemExit("no process gets any further")
    print(written, processes)


def _prepared(run: Callable[[], object], most: int | None) -> int | None:
    """Run in a process that is killed in place of writing one file more than `most`; what it wrote, None if killed."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        _Counted.left, _Counted.written = most, 0
        for name in ("write_text", "append_lines"):
            setattr(RunDirectory, name, _Counted.counting(getattr(RunDirectory, name)))
        run()
        os.write(send, str(_Counted.written).encode())
        os._exit(0)
    os.close(send)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a preparation ended with status {status}")
    with os.fdopen(receive) as answer:
        text = answer.read()
    return int(text) if text else None


class _Counted:
    """Counts what a process writes, and kills it when it may write no more."""

    left: int | None = None
    written = 0

    @classmethod
    def counting(cls, write: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            if cls.left is not None and cls.written >= cls.left:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments)
            cls.written += 1

        return counted


def _quiet(line: str) -> None:
    """Says nothing."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
