"""What a command says to people while it works: lines on standard error, or none where they are not wanted."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TextIO

QUIET = "SSM_MP_QUIET"
"""Environment variable: where it is 1, as `--quiet` sets it, this process and its workers say nothing but errors."""

_SLURM = "SLURM_JOB_ID"
"""Set in jobs of Slurm, whose logs are read long after they were written."""
_DUMB = ("dumb", "unknown")
"""Terminals (`TERM`) that cannot move their cursor."""


def is_quiet(environ: Mapping[str, str] | None = None) -> bool:
    """Whether only errors are to be said."""
    return (os.environ if environ is None else environ).get(QUIET) == "1"


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at a stream on a terminal on which lines can be drawn over."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def dated(line: str, environ: Mapping[str, str] | None = None) -> str:
    """A line as it is said: in jobs of Slurm with the time before it."""
    if _SLURM not in (os.environ if environ is None else environ):
        return line
    return f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {line}"


class Said(logging.Handler):
    """Says what the model side logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(line: str) -> None:
    """Say a line, an error (`error: …`) even where it is quiet. A log on a full disk loses it, and the work goes on."""
    if is_quiet() and not line.startswith("error: "):
        return
    with contextlib.suppress(OSError):
        print(dated(line), file=sys.stderr, flush=True)
