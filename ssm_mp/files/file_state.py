"""Which file a path was when it was read, to find out later that it is another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssm_mp.files.weights_file import WEIGHTS_SUFFIXES


@dataclass(frozen=True)
class FileState:
    """A file at some moment; `identity`: device, number, size and time of its last change, None where it is gone."""

    path: Path
    identity: tuple[int, ...] | None


def state_of(path: Path) -> FileState:
    """A path as it is now."""
    try:
        found = path.stat()
    except OSError:
        return FileState(path, None)
    return FileState(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


def file_states(path: Path) -> tuple[FileState, ...]:
    """The files of weights that a checkpoint's path stands for: itself, or those in its folder."""
    if path.is_file() and not path.name.endswith(".json"):
        return (state_of(path),)
    folder = path if path.is_dir() else path.parent
    return tuple(state_of(file) for file in sorted(folder.iterdir()) if file.suffix.lower() in WEIGHTS_SUFFIXES)
