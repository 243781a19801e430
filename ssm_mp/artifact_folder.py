"""The folder of an artifact: one whole artifact at every moment, beside files that are not the artifact's.

A new artifact is written in a folder that nobody takes for one. Where nothing is in its way, that folder is renamed to
its place. In a folder that is there already it is renamed to `.ssm-mp.new` inside, and from then on it is the artifact
for every reader, until each of its files has its place (as a hard link, else a copy); then `.ssm-mp.new` goes. A writer
that is killed leaves the old artifact or the new one whole, and the next writer goes on from there. What the artifact
did not write is never touched.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssm_mp.errors import ArtifactError

TENSORS, MAP, METRICS = "model.safetensors", "precision_map.json", "metrics.json"
PICTURE, TOKENIZER, SOURCE = "allocation.png", "tokenizer.json", "source_config.json"
ACCOMPANYING = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files beside a checkpoint that its users' programs read, and that go with it into every artifact and export."""
_OWN = (TENSORS, MAP, METRICS, PICTURE)
"""Files of every artifact, which those before 0.5 do not list; others are listed in the map, with their checksums."""

_PARTIAL, _NEW, _MOVING = ".ssm-mp.partial-", ".ssm-mp.new", ".ssm-mp.moving"
"""Folders of a writer: what it writes, what is the artifact until it has its place, what gets its place next."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer one."""


def write_folder(path: Path, write: Callable[[Path], None], *, replace: bool) -> None:
    """Let `write` fill a folder with an artifact, and put it at `path`, whole or not at all.

    replace: an artifact at `path` gives way. Raises ArtifactError where something is in the way or stays in the way,
    OSError where nothing was changed.
    """
    require_free(path, replace)
    new_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _write_within(path, write)
        else:
            with _partial(path.parent) as partial:
                write(partial)
                partial.chmod(0o755)
                partial.rename(path)
    finally:
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()


def _write_within(path: Path, write: Callable[[Path], None]) -> None:
    """The same for a folder that is there and may have other files in it."""
    with _partial(path) as partial:
        write(partial)
        partial.chmod(0o755)
        with _held(path, wait=True):
            _finish_former(path)
            _require_room(path, partial)
            partial.rename(path / _NEW)
            _put_in_place(path, fresh=True)


def remove_artifact(path: Path) -> bool:
    """Remove the artifact in a folder, and the folder where nothing else is in it; whether there was an artifact.

    Raises ArtifactError where it cannot be removed.
    """
    if not is_artifact(path):
        return False
    try:
        _restore_aside(path)
        with _held(path, wait=True):
            _finish_former(path)
            for name in sorted(_own_files(path), key=lambda name: name == MAP):  # it is an artifact to the last
                (path / name).unlink()
    except OSError as error:
        raise ArtifactError(f"{path}: the artifact cannot be removed ({error})") from None
    with suppress(OSError):
        path.rmdir()
    return True


def require_free(path: Path, replace: bool) -> None:
    """Raise ArtifactError where something other than an empty folder, or an artifact to replace, is in the way.

    Before that, what a killed writer has left is put in order.
    """
    try:
        _restore_aside(path)
        if not path.exists():
            if path.is_symlink():
                raise ArtifactError(f"{path} is a link to {path.readlink()}, which does not exist; remove it")
            return
        if not is_artifact(path):
            if path.is_dir() and all(name.startswith((_PARTIAL, _NEW, _MOVING)) for name in _names(path)):
                return
            raise ArtifactError(f"{path} already exists and is no artifact; remove it, or choose another folder")
        if not replace:
            raise ArtifactError(f"{path} already exists; replace it with --force, or choose another folder")
        with _held(path, wait=True):
            _finish_former(path)
        _require_own(path)
    except OSError as error:
        raise ArtifactError(f"{path}: no artifact can be written there ({error})") from None


def is_artifact(path: Path) -> bool:
    """Whether an artifact is read from `path`; that it is a good one is not said."""
    return (folder_of(path) / MAP).is_file()


def folder_of(path: Path) -> Path:
    """The folder that holds the files of the artifact at `path`: itself, unless a writer was killed."""
    if (path / _NEW / MAP).is_file():
        return path / _NEW
    return path if os.path.lexists(path) else _aside(path) or path


def say_where(path: Path, folder: Path) -> None:
    """Tell the user where an artifact at `path` is read from another folder."""
    if folder.parent == path:
        _say(f"{path}: replacing it was interrupted; the new artifact is whole, and is read from {folder}")
    elif folder != path:
        _say(f"{path}: replacing it was interrupted; the old artifact is whole, and is read from {folder}")


def state_of(path: Path) -> tuple[Path, int, int]:
    """What tells whether the artifact at `path` was replaced between two looks at it."""
    folder = folder_of(path)
    with suppress(OSError):
        found = (folder / MAP).stat()
        return folder, found.st_ino, found.st_mtime_ns
    return folder, 0, 0


def sha256(path: Path) -> str:
    """The checksum of a file, as maps hold it."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def _partial(parent: Path) -> Iterator[Path]:
    """A new folder to write in, gone afterwards unless it was renamed."""
    _clear(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
        with _held(folder, wait=True):
            if not folder.exists():  # taken for a dead writer's, before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _clear(parent: Path) -> None:
    """Remove what killed writers have left in a folder; living ones hold theirs."""
    for left in parent.glob(f"{_PARTIAL}*"):
        with suppress(OSError), _held(left, wait=False) as dead:
            if dead:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder's lock; tells whether. It goes with its holder.

    False where another holds it, and where the file system does not lock folders (NFS): there nothing of another is
    removed, and of two that replace one artifact at once the later is refused.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if wait else os.O_NOFOLLOW))
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except OSError:
            got = False
        yield got
    finally:
        os.close(descriptor)


def _finish_former(path: Path) -> None:
    """Put in place what a killed writer did not; `path` is held."""
    if (path / _NEW / MAP).is_file():
        _say(f"{path}: replacing it was interrupted; the new artifact, whole in {path / _NEW}, is put in place now")
        _put_in_place(path, fresh=False)
    for name in (_NEW, _MOVING):  # a new one without its map was withdrawn
        shutil.rmtree(path / name, ignore_errors=True)
    _clear(path)


def _put_in_place(path: Path, *, fresh: bool) -> None:
    """Give each file of the new artifact its place, and remove what only the old one had; `path` is held.

    fresh: none has its place yet, so that the new artifact can be withdrawn as long as that is so.
    """
    new, moving = path / _NEW, path / _MOVING
    try:
        _require_room(path, new)
        names = sorted(_names(new), key=lambda name: name == MAP)  # the map last: it says whose the others are
        stale = _own_files(path) - set(names)
        shutil.rmtree(moving, ignore_errors=True)
        moving.mkdir()
        for name in names:
            _link(new / name, moving / name)
        for name in names:
            if name == MAP:
                for former in stale:
                    (path / former).unlink(missing_ok=True)
            (moving / name).replace(path / name)
            fresh = False
    except (OSError, ArtifactError) as error:
        if fresh:
            shutil.rmtree(moving, ignore_errors=True)
            _withdraw(new)
        if (new / MAP).exists():
            raise ArtifactError(
                f"{path}: the new artifact is whole in {new.absolute()} and is read from there, but not all of its "
                f"files could be put into {path.absolute()}, where those of the old one still are ({error}); the next "
                "--force goes on from there"
            ) from None
        raise
    _withdraw(new)
    shutil.rmtree(moving, ignore_errors=True)


def _withdraw(new: Path) -> None:
    """Without its map it is no artifact, from one moment to the next."""
    with suppress(OSError):
        (new / MAP).unlink()
        shutil.rmtree(new, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _require_room(path: Path, new: Path) -> None:
    """Raise ArtifactError where a file that the artifact at `path` did not write has the name of a new one."""
    own = _own_files(path)
    for name in sorted(_names(new)):
        there = path / name
        if os.path.lexists(there) and name not in own and not (there.is_file() and sha256(there) == sha256(new / name)):
            raise ArtifactError(
                f"{there} was not written by this tool, or was changed since, and stands where the new artifact has a "
                "file of its own; move it away, or choose another folder"
            )


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _require_own(path: Path) -> None:
    """Raise ArtifactError where only the names are those of an artifact."""
    format_ = _metadata_format(path / TENSORS)
    if format_ is None and not _is_ours(_map(path).get("format")):
        raise ArtifactError(
            f"{path} already exists and is no artifact: its {MAP} is none of this tool; remove it, or choose another "
            "folder"
        )
    if format_ is not None and not _is_ours(format_):
        raise ArtifactError(
            f"{path / TENSORS} was not written by this tool, so it is not replaced; move it away, or choose another "
            "folder"
        )


def _is_ours(format_: object) -> bool:
    return isinstance(format_, str) and format_.startswith("ssm-mp/")


def _own_files(path: Path) -> set[str]:
    """Names in a folder that the artifact there wrote: the usual ones, and those listed that nobody has changed."""
    if not (path / MAP).is_file():
        return set()
    listed = _map(path).get("files")
    checksums: Mapping[str, object] = listed if isinstance(listed, dict) else {}
    own = {name for name in _OWN if os.path.lexists(path / name) and not (path / name).is_dir()}
    return own | {
        name
        for name, checksum in checksums.items()
        if Path(name).name == name and (path / name).is_file() and sha256(path / name) == checksum
    }


def _map(path: Path) -> dict[str, Any]:
    """The map of a folder, empty where it is not readable."""
    try:
        content = json.loads((path / MAP).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _metadata_format(path: Path) -> object:
    """The format that the metadata of a safetensors file says, "" where it says none; None where it is not readable."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(header, dict):
        return None
    metadata = header.get("__metadata__")
    return metadata.get("format", "") if isinstance(metadata, dict) else ""


def _aside(path: Path) -> Path | None:
    """Where version 0.4 moved the artifact at `path` before it was killed; None where it did not."""
    name = glob.escape(path.name)
    found = [aside for aside in path.parent.glob(f".{name}.old-*/{name}") if (aside / MAP).is_file()]
    return max(found, key=lambda aside: aside.parent.stat().st_mtime, default=None)


def _restore_aside(path: Path) -> None:
    """Put back what version 0.4 moved aside."""
    aside = None if os.path.lexists(path) else _aside(path)
    if aside is None:
        return
    try:
        aside.rename(path)
    except OSError as error:
        raise ArtifactError(f"{aside.absolute()}: the former artifact cannot be put back to {path} ({error})") from None
    with suppress(OSError):
        aside.parent.rmdir()
    _say(f"{path}: replacing it was interrupted; the old artifact was put back from {aside.parent}")


def _say(line: str) -> None:
    logging.getLogger("ssm_mp").warning("note: %s", line)
