"""Tables: the same cells on a terminal and in a pipe; nothing is cut off, nothing is taken for markup."""

from __future__ import annotations

import io
import re

import pytest

from search.cli.tables import table
from tests.search.base.test_progress import Terminal

HEAD = ("component", "kind", "bytes")
ROWS = [("layers.0.in_proj", "[bold]in_proj[/bold]", "1,024"), ("embedding", "", "7")]


@pytest.fixture(autouse=True)
def a_terminal_of_a_known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_columns_are_aligned_and_plain_where_nobody_looks() -> None:
    assert table(HEAD, ROWS, 2, io.StringIO()).splitlines() == [
        "component         kind                  bytes",
        "layers.0.in_proj  [bold]in_proj[/bold]  1,024",
        "embedding                                   7",
    ]


def test_a_terminal_gets_a_rule_and_the_same_cells() -> None:
    drawn = table(HEAD, ROWS, 2, Terminal())
    assert "\x1b[1m" in drawn
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
    assert set(plain[1]) <= {"─", " "}
    for line, cells in zip([plain[0], *plain[2:]], [HEAD, *ROWS], strict=True):
        assert line.split() == [cell for cell in cells if cell]


def test_no_colours_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", table(HEAD, ROWS, 2, Terminal()))


def test_a_cell_that_is_too_long_for_a_terminal_is_folded() -> None:
    name = "abcdefghij" * 9
    drawn = re.sub(r"\x1b\[[0-9;]*m|[\s─]", "", table(("name",), [(name,)], 1, Terminal()))
    assert drawn == "name" + name
    assert table(("name",), [(name,)], 1, io.StringIO()).splitlines()[1] == name


def test_a_terminal_that_knows_no_lines_gets_signs_of_ascii() -> None:
    class Ascii(Terminal):
        encoding = "ascii"

    assert table(HEAD, ROWS, 2, Ascii()).isascii()


def test_a_table_of_thousands_of_rows_is_plain_everywhere() -> None:
    rows = [("a", "b", str(i)) for i in range(2000)]
    assert table(HEAD, rows, 2, Terminal()) == table(HEAD, rows, 2, io.StringIO())
