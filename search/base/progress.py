"""Progress on standard error: a live line on a terminal, by rich; plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from functools import cache
from typing import TYPE_CHECKING, TextIO

from search.base.clock import clock
from search.base.saying import dated, is_quiet, is_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log file stays short."""

_DRAWN_A_SECOND = 4
"""How often a live line is drawn anew, whether something was done or not."""

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
        self._quiet, self._terminal = is_quiet(), is_terminal(self._stream)
        self._after, self._percent = after, percent
        self._began = time.monotonic()
        self._printed: float | None = None
        self._live: _Live | None = None
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
        if self._quiet or now - self._began < self._after:
            return
        if self._terminal:
            if self._live is None:
                self._live = _Live(self._stream, self._stage, self._total, self._percent)
            self._live.show(self._done, best, self._left(now))
            if self._done >= self._total:
                self._live.close()
        elif self._printed is None or now - self._printed >= _PLAIN_EVERY or self._done >= self._total:
            print(dated(self._line(now, best)), file=self._stream, flush=True)
            self._printed = now

    def _left(self, now: float) -> str:
        """The time left, if the rest takes as long as what was made since the beginning."""
        made = self._done - self._first
        return f"{clock((now - self._began) / made * (self._total - self._done) if made else 0.0)} left"

    def _line(self, now: float, best: str) -> str:
        count = f"{self._done}/{self._total}"
        if self._percent:
            count = f"{100 * self._done // max(1, self._total)} %"
        return "  ".join(part for part in (f"{self._stage} {count}", best, self._left(now)) if part)

    def close(self) -> None:
        """End the live line where the stage stopped early."""
        if self._live is not None:
            self._live.close()


class _Live:
    """A line of rich's, from now on until it is closed; whatever is said meanwhile stands above it."""

    def __init__(self, stream: TextIO, stage: str, total: int, percent: bool) -> None:
        self._bar, self._task = _drawn(stream, stage, total, percent)
        # an error, or an interrupt, that nobody closed the line for leaves no terminal without a cursor
        self._end = weakref.finalize(self, self._bar.stop)

    def show(self, done: int, best: str, left: str) -> None:
        self._bar.update(self._task, completed=done, best=best, left=left)
        if not self._bar.live.is_started and self._end.alive:
            self._bar.start()

    def close(self) -> None:
        self._end()


def _drawn(stream: TextIO, stage: str, total: int, percent: bool) -> tuple[Bar, TaskID]:
    """The columns of a live line, and its only task."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    count: ProgressColumn = TextColumn("{task.percentage:.0f} %", markup=False) if percent else MofNCompleteColumn()
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        count,
        TextColumn("{task.fields[best]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", markup=False, style="cyan", table_column=Column(no_wrap=True)),
        console=_console(getattr(stream, "rich_proxied_file", stream)),
        refresh_per_second=_DRAWN_A_SECOND,
        redirect_stdout=False,
    )
    return bar, bar.add_task(stage, total=total, best="", left="")


@cache
def _console(stream: TextIO) -> Console:
    """The one that all live lines of a stream share, so that one may be drawn below another."""
    from rich.console import Console

    return Console(file=stream)


def slow(stage: str, total: int) -> Progress:
    """Of a step that is mostly short: nothing is said unless it takes longer than `SLOW` seconds."""
    return Progress(stage, total, after=SLOW, percent=True)
