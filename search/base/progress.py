"""Progress on standard error: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TextIO

from search.base.clock import clock

_PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log file stays short."""

SLOW = 5.0
"""Seconds that a step may take without a word."""


class Progress:
    """Counts steps of one stage, from any number of threads; `best` is a short text of the best so far."""

    def __init__(
        self,
        stage: str,
        total: int,
        done: int = 0,
        stream: TextIO | None = None,
        *,
        after: float = 0.0,
        percent: bool = False,
    ) -> None:
        """after: seconds before the first line; a stage that is over by then has none. percent: not the numbers."""
        self._stage = stage
        self._total = total
        self._first = self._done = done
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._after, self._percent = after, percent
        self._began = time.monotonic()
        self._printed: float | None = None
        self._lock = threading.Lock()

    def step(self, best: str = "") -> None:
        """One more done."""
        with self._lock:
            self._done += 1
            self._show(best)

    def show(self, done: int, best: str = "") -> None:
        """So many done by now, by this process and others."""
        with self._lock:
            self._done = done
            self._show(best)

    def _show(self, best: str) -> None:
        now = time.monotonic()
        if now - self._began < self._after:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + self._line(now, best)[:width].ljust(width))
            if self._done >= self._total:
                self._stream.write("\n")
            self._stream.flush()
        elif self._printed is None or now - self._printed >= _PLAIN_EVERY or self._done >= self._total:
            print(self._line(now, best), file=self._stream, flush=True)
        else:
            return
        self._printed = now

    def _line(self, now: float, best: str) -> str:
        made = self._done - self._first
        left = (now - self._began) / made * (self._total - self._done) if made else 0.0
        count = f"{self._done}/{self._total}"
        if self._percent:
            count = f"{100 * self._done // max(1, self._total)} %"
        return "  ".join(part for part in (f"{self._stage} {count}", best, f"{clock(left)} left") if part)

    def close(self) -> None:
        """End the live line where the stage stopped early."""
        if self._live and self._done < self._total and self._printed is not None:
            self._stream.write("\n")


def slow(stage: str, total: int) -> Progress:
    """Of a step that is mostly short: nothing is said unless it takes longer than `SLOW` seconds."""
    return Progress(stage, total, after=SLOW, percent=True)
