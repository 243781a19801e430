"""Tables of answers: drawn by rich on a terminal, aligned columns of plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from search.base.saying import is_terminal

_MANY = 2000
"""Rows from which on a table is plain on a terminal too: nobody looks at it whole, and drawing it takes seconds."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, stream: TextIO | None = None) -> str:
    """A table for a stream, standard output unless another is given, without a line break at its end.

    The first `left` columns are text, the others numbers.
    """
    stream = sys.stdout if stream is None else stream
    lines = [list(row) for row in rows]
    return (
        _drawn(head, lines, left, stream) if is_terminal(stream) and len(lines) < _MANY else _plain(head, lines, left)
    )


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _drawn(head: Sequence[str], rows: Sequence[Sequence[str]], left: int, stream: TextIO) -> str:
    """With a rule below the head, as wide as the terminal at the most: longer cells are folded, none is cut off."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, name in enumerate(head):
        drawn.add_column(Text(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(file=stream)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip("\n")
