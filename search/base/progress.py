"""Progress on standard error: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from search.base.clock import clock

_PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log file stays short."""


class Progress:
    """Counts steps of one stage; `best` is a short text of the best so far."""

    def __init__(self, stage: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._stage = stage
        self._total = total
        self._first = self._done = done
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._began = time.monotonic()
        self._printed = -_PLAIN_EVERY

    def step(self, best: str = "") -> None:
        """One more done."""
        self._done += 1
        self._show(best)

    def show(self, done: int, best: str = "") -> None:
        """So many done by now, by this process and others."""
        self._done = done
        self._show(best)

    def _show(self, best: str) -> None:
        now = time.monotonic()
        spent = now - self._began
        made = self._done - self._first
        left = spent / made * (self._total - self._done) if made else 0.0
        parts = [f"{self._stage} {self._done}/{self._total}", best, f"{clock(left)} left"]
        line = "  ".join(part for part in parts if part)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width].ljust(width))
            if self._done >= self._total:
                self._stream.write("\n")
            self._stream.flush()
        elif now - self._printed >= _PLAIN_EVERY or self._done >= self._total:
            self._printed = now
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line where the stage stopped early."""
        if self._live and self._done < self._total:
            self._stream.write("\n")
