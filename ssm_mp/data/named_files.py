"""The files that a study's text names: files themselves, folders, and patterns, in an order of their own."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_mp.errors import DataError

_KINDS = {
    "Parquet tables": (".parquet",),
    "JSON lines": (".jsonl", ".ndjson", ".jsonl.gz"),
    "texts": (".txt", ".text"),
    "Markdown texts": (".md", ".rst"),
}
"""What a folder is taken for: the first of these kinds that it holds, so that a data set's README is none of it."""

_SHOWN = 3
"""Names of left out files that are said."""


@dataclass(frozen=True)
class NamedFiles:
    """The files, each once, and a sentence on each folder of which files were left out."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def named_files(names: Sequence[Path]) -> NamedFiles:
    """Expand folders (all files below them of one kind) and patterns (`*`, `?`, `[…]`, `**` for any folders).

    What one name stands for is sorted by path, names keep their order. A file whose own name looks like a pattern is
    that file. Raises DataError for what names no file.
    """
    found: dict[str, Path] = {}
    notes: list[str] = []
    for name in names:
        if name.is_dir():
            paths, note = _in_folder(name)
            notes += [note] if note else []
        elif name.exists() or not glob.has_magic(str(name)):
            if not name.is_file():
                raise DataError(f"no text or token file at {name}")
            paths = [name]
        else:
            paths = _matched(name)
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return NamedFiles(tuple(found.values()), tuple(notes))


def _matched(pattern: Path) -> list[Path]:
    paths = [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207  # absolute, perhaps with **
    files = sorted((path for path in paths if path.is_file()), key=Path.as_posix)
    if not files:
        folders = " (only folders do: name the files in them, as in folder/*.txt)" if paths else ""
        raise DataError(f"no file matches {pattern}{folders}")
    return files


def _in_folder(folder: Path) -> tuple[list[Path], str]:
    """The files of a folder's first kind, and what was left out beside them."""
    files = sorted(_below(folder), key=Path.as_posix)
    for kind, suffixes in _KINDS.items():
        taken = [path for path in files if path.name.lower().endswith(suffixes)]
        if not taken:
            continue
        left = [path.relative_to(folder).as_posix() for path in files if path not in set(taken)]
        if not left:
            return taken, ""
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        said = ", ".join(left[:_SHOWN]) + more
        return taken, f"{folder}: {len(taken)} {kind} are read, and {said} left out; a pattern names files itself"
    known = ", ".join(suffix for suffixes in _KINDS.values() for suffix in suffixes)
    raise DataError(
        f"{folder} holds no text that is known by its name ({known}); name the files with a pattern, as in "
        f"{folder.name}/**/*.py"
    )


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones left out; links to folders are not followed."""
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (path for name in names if not name.startswith(".") and (path := Path(here, name)).is_file())
