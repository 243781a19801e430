"""How values of foreign files appear in messages: short, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 120


def shown(value: object) -> str:
    """A value as a message shows it: at most 120 characters, never an error.

    >>> shown("auto"), shown(48), shown({"a": 1})
    ("'auto'", '48', "{'a': 1}")
    """
    if value is None or isinstance(value, bool | float | str):
        text = repr(value[: _LONGEST + 1] if isinstance(value, str) else value)
    elif isinstance(value, int):
        text = str(value) if value.bit_length() <= 256 else f"a number of {value.bit_length()} bits"
    elif isinstance(value, list | tuple | dict) and len(value) <= 3 and all(map(_plain, value)):
        text = repr(value) if not isinstance(value, dict) or all(map(_plain, value.values())) else "a dictionary"
    else:
        text = f"a {type(value).__name__}"
    return _cut(text)


def shown_name(name: str) -> str:
    """A tensor's name or a key, on one line and cut in the middle where it is long."""
    ends = name if len(name) <= 2 * _LONGEST else name[:_LONGEST] + name[-_LONGEST:]
    return _cut("".join(sign if sign.isprintable() else "·" for sign in ends))


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    held = list(names)
    first = ", ".join(map(shown_name, held[:most]))
    return first if len(held) <= most else f"{first} and {len(held) - most:,} more"


def _plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= 64)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 3 :]}"
