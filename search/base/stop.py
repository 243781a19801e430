"""Stopping on a signal: the handler sets a flag, and the work asks for it between two layers.

Nothing is raised from a handler: that would break whatever was being written at that moment.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class WorkInterruptedError(Exception):
    """Work was left because a signal asked for it; raised where the work itself looks, never from a handler."""


class Stop:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise WorkInterruptedError where a signal asked to stop."""
        if self.signal is not None:
            raise WorkInterruptedError(self.signal.name)

    def sleep(self, seconds: float) -> None:
        """Sleep, but not past a signal by more than a moment."""
        end = time.monotonic() + seconds
        while not self and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    @contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Take these signals as requests to stop."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or signal.Signals(number)

        former = {one: signal.signal(one, handler) for one in signals}
        try:
            yield
        finally:
            for one, before in former.items():
                signal.signal(one, before)
