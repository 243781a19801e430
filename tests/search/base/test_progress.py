"""Progress: a live line on a terminal, few plain lines elsewhere, none where it is quiet."""

from __future__ import annotations

import gc
import io
import re
import sys

import pytest

from search.base.progress import Progress, slow
from search.base.saying import QUIET, say

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
"""What a terminal is told so that it hides its cursor, and shows it again."""


class Terminal(io.StringIO):
    """A stream on which somebody looks, or not."""

    def __init__(self, live: bool = True) -> None:
        super().__init__()
        self._live = live

    def isatty(self) -> bool:
        return self._live


@pytest.fixture(autouse=True)
def a_terminal_of_a_known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in (QUIET, "SLURM_JOB_ID", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def shown(stream: io.StringIO) -> str:
    """What was written, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(live: bool) -> None:
    stream = Terminal(live)
    progress = Progress("trials", 3, stream=stream)
    for _ in range(3):
        progress.step("best 2.00×")
    assert ("\r" in stream.getvalue()) is live
    last = shown(stream).replace("\r", "\n").rstrip().splitlines()[-1 if not live else -2]
    for part in ("trials", "3/3", "best 2.00×", "0:00 left"):
        assert part in last
    assert stream.getvalue().count("\n") == (1 if live else 2)


def test_no_colour_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    Progress("trials", 1, stream=stream).step()
    assert "1/1" in stream.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", stream.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Progress("trials", 1, stream=stream).step()
    assert stream.getvalue() == "trials 1/1  0:00 left\n"


def test_nothing_is_drawn_where_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUIET, "1")
    for live in (True, False):
        stream = Terminal(live)
        progress = Progress("trials", 1, stream=stream)
        progress.step()
        progress.close()
        assert stream.getvalue() == ""


def test_plain_lines_in_a_job_of_slurm_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stream = Terminal(live=False)
    Progress("trials", 1, stream=stream).step()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  trials 1/1  0:00 left\n", stream.getvalue())


def test_a_short_step_says_nothing() -> None:
    stream = Terminal()
    progress = Progress("reading", 2, stream=stream, after=1e9)
    progress.step()
    progress.step()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("closed", [True, False])
def test_a_line_that_ends_early_leaves_the_cursor_as_it_was(closed: bool) -> None:
    stream = Terminal()
    progress = Progress("trials", 9, stream=stream)
    progress.step()
    assert stream.getvalue().rindex(HIDDEN) >= 0
    if closed:
        progress.close()
    del progress  # as an exception leaves it
    gc.collect()
    assert stream.getvalue().rindex(SHOWN) > stream.getvalue().rindex(HIDDEN)


def test_what_is_said_meanwhile_stands_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("trials", 2)
    progress.step()
    say("note: something [bold]else[/bold]")
    progress.step()
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))
    assert "note: something [bold]else[/bold]" in lines


def test_a_step_within_a_step_has_a_line_below(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    outer = Progress("probes", 9)
    outer.step()
    inner = Progress("the lowest map", 2)
    inner.step()
    inner.step()
    outer.step()
    outer.close()
    assert sys.stderr is stream
    for part in ("probes", "1/9", "the lowest map", "2/2"):
        assert part in shown(stream)


def test_a_slow_step_counts_in_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(live=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("search.base.progress.SLOW", 0.0)
    progress = slow("reading", 4)
    for _ in range(4):
        progress.step()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["reading 25 %", "reading 100 %"]
