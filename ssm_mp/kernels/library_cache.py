"""Where compiled kernels are kept between processes: in the user's cache folder, each file named for its content.

A name holds the key of what was compiled and the digest of the file, so that one rename puts both in place. A file
that is not what its name says (cut short, empty, changed) is not loaded, nor one that another user could have written.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OPEN_FILES = Path("/proc/self/fd")


def private_folders() -> list[Path]:
    """Those of the usual folders in which nobody but this user can put a library, the best one first.

    They are `ssm-mp` in `$XDG_CACHE_HOME`, else `~/.cache`; and one in the folder for temporary files, for users
    without a home. One that is missing is made; one that others can write to is passed over with a note.
    """
    found = []
    for path in _usual_folders():
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            problem = _problem(path.lstat(), link=path.is_symlink()) or _problem(path.stat())
            loads = not os.statvfs(path).f_flag & os.ST_NOEXEC
        except OSError:
            continue
        if problem is not None:
            logging.getLogger("ssm_mp").warning("note: compiled kernels are not kept in %s: %s", path, problem)
        elif loads:
            found.append(path)
    return found


def load(folders: Iterable[Path], key: str) -> ctypes.CDLL | None:
    """The library that is kept under a key; None where it is missing or damaged. Raises OSError where it cannot load.

    What is loaded is the very file that was read and found whole, whatever has its name by now; nobody else can write
    into it, and this user's processes put files in place by renaming whole ones.
    """
    for path in (path for folder in folders for path in sorted(folder.glob(f"kernels-{key}-*.so"))):
        descriptor = _whole(path, key)
        if descriptor is not None:
            itself = _OPEN_FILES / str(descriptor)
            try:
                # it stays open: dlopen goes by the name, so another file under the same number would be taken for this
                return ctypes.CDLL(str(itself if itself.exists() else path))
            except OSError:
                os.close(descriptor)
                raise
    return None


def _whole(path: Path, key: str) -> int | None:
    """A descriptor of a kept file; None where it is gone, not readable, another user's, or not what its name says."""
    with suppress(OSError), path.open("rb") as file:
        if _problem(os.fstat(file.fileno())) is None and path.name == _name(key, file.read()):
            return os.dup(file.fileno())
    return None


def keep(folders: Iterable[Path], key: str, built: Path) -> None:
    """Put a library into the first folder that takes it; where none does, the next process compiles again."""
    content = built.read_bytes()
    for folder in folders:
        with suppress(OSError):
            _put(folder, key, content)
            return


def _put(folder: Path, key: str, content: bytes) -> None:
    """By a temporary name and a rename, so that processes may do so at once."""
    for old in folder.glob(f"kernels-{key}*.so"):  # damaged, or as earlier versions named it
        old.unlink(missing_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(partial).replace(folder / _name(key, content))
    finally:
        Path(partial).unlink(missing_ok=True)


def _usual_folders() -> Iterator[Path]:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # another one is to be ignored, says the XDG specification
        yield base / "ssm-mp"
    else:
        with suppress(RuntimeError):  # nobody knows this user's home
            if Path.home().is_dir():
                yield Path.home() / ".cache" / "ssm-mp"
    with suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"ssm-mp-{os.geteuid()}"


def _name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()}.so"


def _problem(status: os.stat_result, link: bool = False) -> str | None:
    """Why a file or folder (a link, whose mode means nothing) may be what another user put there; None where not."""
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    if not link and status.st_mode & _OTHERS_WRITE:
        return "others can write to it; chmod go-w makes it yours alone"
    return None
