"""Standard output and error of a command: what their encoding, their reader or their disk may do to them."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any, TextIO

from search.base.paths import shown
from ssm_mp.errors import MachineError

READER_GONE = 141
"""Exit code where whoever read standard output left, as in `ssm-mp front … | head -1`: 128 + SIGPIPE.

That is what a shell sees of every other program that is cut off there, and it is none of the answers' own codes. The
signal itself would be the usual way, but it would also end a search whose standard error nobody reads any more.
"""

_READABLE = "ssm-mp-readable"
"""Name of the error handler that writes signs in ASCII where an encoding has none for them."""

_SIGNS = {
    "×": "x", "·": "*", "÷": "/", "−": "-", "–": "-", "—": "-", "‑": "-", "±": "+/-", "→": "->", "←": "<-", "↔": "<->",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∞": "inf", "√": "sqrt", "‖": "||", "…": "...", "•": "*", "✓": "yes",
    "✗": "no", "²": "^2", "³": "^3", "½": "1/2", "µ": "u", "μ": "u", "°": " deg", "“": '"', "”": '"', "„": '"',
    "‘": "'", "’": "'", "«": '"', "»": '"', "\xa0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip

_REPLACED = ("strict", "surrogateescape", "backslashreplace")
"""Python's own ways of handling what cannot be encoded; any other was chosen by the user."""


def readable(text: str) -> str:
    r"""A text in ASCII: signs as they are typed, other characters as Python's escapes, so that names stay exact.

    >>> readable("3.90× at −0.1 ± 0.2 %: modèle.pt")
    '3.90x at -0.1 +/- 0.2 %: mod\\xe8le.pt'
    """
    return "".join(sign if sign.isascii() else _SIGNS.get(sign) or ascii(sign)[1:-1] for sign in text)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return readable(shown(error.object[error.start : error.end])), error.end


def open_streams() -> tuple[TextIO, TextIO]:
    """Make standard output and error take every text. Called once, before a command says anything.

    Streams that were closed get a descriptor, or the next file that is opened would have it and be written into:
    standard output one that refuses what is written, since an answer would be lost; standard error one that drops it.
    """
    codecs.register_error(_READABLE, _replaced)
    _filled(0, os.O_RDONLY)
    sys.stdout = _usable(sys.stdout, 1, os.O_RDONLY)
    sys.stderr = _lossy(_usable(sys.stderr, 2, os.O_WRONLY))
    return sys.stdout, sys.stderr


def _usable(stream: TextIO | None, descriptor: int, flags: int) -> TextIO:
    if stream is None:
        _filled(descriptor, flags)
        stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # a descriptor
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _REPLACED:
        stream.reconfigure(errors=_READABLE)
    return stream


class _LossyFile(io.FileIO):
    """A descriptor that drops what it cannot write: a log on a full disk loses lines, and the work goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _lossy(stream: TextIO) -> TextIO:
    """Standard error as one that never fails; what a program put in its place is left as it is."""
    if stream is not sys.__stderr__ or not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = io.BufferedWriter(_LossyFile(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


def _filled(descriptor: int, flags: int) -> None:
    """Put the null device where a descriptor is closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, flags)  # the lowest that is free, which is this one
        os.set_inheritable(null, True)


def write_out(text: str) -> None:
    """Write an answer to standard output, at once. Raises MachineError where it is not taken; OSError (EPIPE) where
    nobody reads any more, which is no failure.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MachineError(f"the answer cannot be written to standard output ({error.strerror or error})") from None


def close_streams(streams: tuple[TextIO, TextIO]) -> None:
    """Drop what the streams did not take: Python would try again as it ends, complain, and change the exit code."""
    sys.stdout, sys.stderr = streams
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
