"""Pickles of classes that are not there when they are read, and a watch over what reading does."""

from __future__ import annotations

import codecs
import io
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def classes(module: str, **held: type) -> Iterator[None]:
    """The classes under the names that a pickle will have for them; their modules vanish afterwards."""
    parts = module.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    for name in names:
        if name == module or name not in before:
            sys.modules[name] = types.ModuleType(name)
    for name, one in held.items():
        one.__module__, one.__qualname__, one.__name__ = module, name, name
        setattr(sys.modules[module], name, one)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def save(path: Path, content: object, protocol: int = 2, *, zipped: bool = True) -> Path:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A zip archive like torch's with any pickle and entries (`data_0` is `data/0`)."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            file.writestr(f"archive/{name.replace('_', '/')}", data)
    return path


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def old_format(content: object) -> bytes:
    held = io.BytesIO()
    torch.save(content, held, _use_new_zipfile_serialization=False)
    return held.getvalue()


_WATCHED = ("import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "marshal.")
_CODECS = ("ascii", "cp437", "latin-1", "raw-unicode-escape", "utf-8", "utf-32-be", "utf-32-le")
"""Python imports a codec at its first use; no file can name others."""
_seen: list[str] | None = None
_hooked = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _seen.append(f"open {arguments[0]} {arguments[1]}")
    elif event.startswith(_WATCHED):
        _seen.append(f"{event} {arguments[:1]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is imported, run, compiled, written or started inside, by Python's audit events."""
    global _seen, _hooked  # noqa: PLW0603, an audit hook stays for the life of the process
    if not _hooked:
        for name in _CODECS:
            codecs.lookup(name)
        sys.addaudithook(_watch)
        _hooked = True
    found: list[str] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None
