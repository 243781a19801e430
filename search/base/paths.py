"""Paths as people write them in a study: relative to its file, with `~` and variables of the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)

_ESCAPED = re.compile("[\udc80-\udcff]+")
"""Bytes of file names as Python holds them where they are no characters of the locale."""


class PathError(Exception):
    """What in a path cannot be made out."""


def absolute(path: str, folder: Path) -> Path:
    """A path, relative to `folder`, as an absolute one: `~`, `~user`, `$NAME` and `${NAME}` stand for what they name.

    A file whose own name has such signs is found under it. Links are not followed, nor is `..` taken away: behind a
    link it leads elsewhere. Raises PathError for an unset variable or an unknown home.
    """
    if (folder / _on_disk(path)).exists():
        return (folder / _on_disk(path)).absolute()
    expanded = _VARIABLE.sub(_value, path)
    try:
        home = Path(_on_disk(expanded)).expanduser()
    except RuntimeError:
        raise PathError(f"nobody knows the home folder that {expanded.split('/')[0]} stands for") from None
    return (folder / home).absolute()


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise PathError(f"{found[0]}: expected the name of an environment variable, as in ${{SCRATCH}}")
    if name not in os.environ:
        raise PathError(f"the environment variable {name} is not set; export it, or write the path itself")
    return os.environ[name]


def shown(text: str) -> str:
    """A text with paths in it, to be read: bytes that the locale could not decode as the UTF-8 that they mostly are."""
    return _ESCAPED.sub(
        lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"), text
    )


def _on_disk(path: str) -> str:
    """A path as Python names it; by its UTF-8 where the locale (`LC_ALL=C`) has no such characters."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return path
