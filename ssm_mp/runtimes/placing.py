"""A file or folder that stands in its place whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ssm_mp.errors import ExportError
from ssm_mp.files.shown import listed

METRICS = "metrics.json"
"""What was written, and what its runtime said of it: in a folder under this name, beside a file with it as suffix."""
_OURS = {"written_by": "ssm-mp"}
_SHOWN = 4


def told_beside(path: Path, suffix: str) -> Path:
    """Where what was found of an exported file or folder stands."""
    return path.with_name(f"{path.name}.{METRICS}") if suffix else path / METRICS


def _told(path: Path, suffix: str) -> dict[str, Any] | None:
    """What this tool has told of the file or folder at `path`; None where it has not."""
    try:
        told = json.loads(told_beside(path, suffix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and _OURS.items() <= told.items() else None


def _is_ours(path: Path, suffix: str) -> bool:
    """Whether what stands at `path` is a file, or a folder, that this tool wrote."""
    return not path.is_symlink() and path.is_dir() != bool(suffix) and _told(path, suffix) is not None


def _foreign(folder: Path) -> list[str]:
    """What is in a folder of ours that this tool did not put there."""
    told = _told(folder, "") or {}
    return sorted({path.name for path in folder.iterdir()} - {METRICS, *told.get("files", ())})


def require_free(path: Path, suffix: str, replace: bool) -> None:
    """Raise ExportError where something is in the way: with `replace`, anything that this tool did not write."""
    if suffix and not path.name.endswith(suffix):
        raise ExportError(f"{path}: expected a name that ends with {suffix}, which this format's files have")
    if suffix and os.path.lexists(told_beside(path, suffix)) and _told(path, suffix) is None:
        raise ExportError(
            f"{told_beside(path, suffix)} was not written by this tool, and what is found of {path.name} has to stand "
            "there; move it away, or choose another name"
        )
    if not os.path.lexists(path):
        return
    if not replace:
        raise ExportError(f"{path} already exists; replace it with --force, or choose another name")
    if not _is_ours(path, suffix):
        raise ExportError(
            f"{path} was not written by this tool as it stands there; move it away, or choose another name"
        )
    foreign = [] if suffix else _foreign(path)
    if foreign:
        raise ExportError(
            f"{path} holds what this tool did not write: {listed(foreign, _SHOWN)}; move that away, or choose another "
            "name"
        )


def remove(path: Path, suffix: str) -> None:
    """Remove a file or folder that this tool wrote, with what was found of it; anything else stays.

    Raises OSError where it cannot be removed.
    """
    told = _told(path, suffix)
    if told is None or not _is_ours(path, suffix):
        return
    own = [path] if suffix else [path / Path(name).name for name in told.get("files", ())]
    for file in (*own, told_beside(path, suffix)):
        file.unlink(missing_ok=True)
    if not suffix and not any(path.iterdir()):
        path.rmdir()


def put(path: Path, suffix: str, write: Callable[[Path], Mapping[str, Any]], *, replace: bool) -> Mapping[str, Any]:
    """Let `write` fill a file or folder of another name, put it at `path`, and what it returns beside it.

    Nothing is left of it where it raises. Raises ExportError where something is in the way, or the disk refuses.
    """
    require_free(path, suffix, replace)
    parents = [parent for parent in path.parents if not parent.exists()]
    new = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ssm-mp.export-", dir=path.parent) as folder:
            new = Path(folder, path.name)
            told = {**_OURS, **write(new)}
            if not suffix:
                told["files"] = sorted(file.name for file in new.iterdir())
            told_beside(new, suffix).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            _place(new, path, suffix, Path(folder))
    except ExportError as error:  # of a file that is gone, at a name that nobody has asked for
        raise type(error)(str(error).replace(str(new), str(path))) from None
    except (OSError, SafetensorError) as error:
        # numpy, which writes GGUF's tensors, says only that it wrote less than it was asked to
        full = "; the disk may be full" if isinstance(error, OSError) and error.errno is None else ""
        raise ExportError(f"{path}: it could not be written ({error}{full}); nothing was left behind") from None
    finally:
        if not os.path.lexists(path):
            for parent in parents:
                with suppress(OSError):
                    parent.rmdir()
    return told


def _place(new: Path, path: Path, suffix: str, folder: Path) -> None:
    """Rename what was written to its place; what stood there goes last, and comes back where that fails."""
    if suffix:
        told_beside(new, suffix).replace(told_beside(path, suffix))
        new.replace(path)
        return
    new.chmod(0o755)
    if not path.exists():
        new.rename(path)
        return
    former = folder / f"{path.name}.former"
    path.rename(former)
    try:
        new.rename(path)
    except OSError:
        former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)
