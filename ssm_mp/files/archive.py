"""The zip archive of torch ≥ 1.6: entries stored as they are, found by the archive's directory."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import BinaryIO, cast

import torch

from ssm_mp.errors import CheckpointError
from ssm_mp.files.inert import DamagedError
from ssm_mp.files.pickled import Source
from ssm_mp.files.storages import read_into

_HEADER, _ENCRYPTED = 30, 1
"""Bytes of an entry's own header before its name, and the flag of an encrypted one."""


@dataclass(frozen=True)
class Entry:
    """Where an entry's bytes are in the file."""

    name: str
    start: int
    size: int


class _Bounded:
    """A file for zipfile, which asks for as many bytes as a damaged directory says, and gets those that there are."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if count < 0 else min(count, left))


class Archive:
    """A torch archive's entries; `size`: bytes of the file.

    Raises CheckpointError for TorchScript and for entries that torch does not write, DamagedError for a broken archive.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size
        try:
            with zipfile.ZipFile(cast("BinaryIO", _Bounded(file, size))) as held:
                entries = held.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise DamagedError(str(error) or "not a zip archive") from None
        self._entries = {entry.filename: entry for entry in entries}
        self._size = size
        self._root = self._find_root(entries)
        if len(self._entries) != len(entries):
            raise DamagedError("two of its entries have one name")

    def _find_root(self, entries: list[zipfile.ZipInfo]) -> str:
        """The folder in which torch puts everything."""
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        for root in roots:
            if f"{root}constants.pkl" in self._entries or any(
                name.startswith(f"{root}code/") for name in self._entries
            ):
                raise CheckpointError(
                    "a TorchScript program (torch.jit.save), not a checkpoint; save the weights alone, "
                    "torch.save(torch.jit.load(file).state_dict(), new), best as .safetensors"
                )
        if len(roots) != 1:
            names = ", ".join(repr(entry.filename[:60]) for entry in entries[:4]) or "nothing"
            raise CheckpointError(f"a zip archive, but not one that torch.save wrote: it holds {names}")
        return roots[0]

    def entry(self, name: str) -> Entry:
        """Where the entry of this name is. Raises DamagedError where there is none, or its header says otherwise."""
        held = self._entries.get(self._root + name)
        if held is None:
            raise DamagedError(f"no entry {name[:60]}")
        if held.compress_type != zipfile.ZIP_STORED or held.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"refused: its entry {name[:60]} is compressed or encrypted, which torch.save never does; unpack it "
                "and pack it again without compression (zip -0), or save it again"
            )
        if held.compress_size != held.file_size or not 0 <= held.header_offset <= self._size - _HEADER:
            raise DamagedError(f"the entry {name[:60]} has two sizes")
        self._file.seek(held.header_offset)
        header = self._file.read(_HEADER)
        if header[:4] != b"PK\3\4":
            raise DamagedError(f"the entry {name[:60]} is not where the directory says")
        start = held.header_offset + _HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        if start + held.file_size > self._size:
            raise DamagedError(f"the entry {name[:60]} ends behind the file")
        return Entry(name, start, held.file_size)

    def byte_order(self) -> str:
        """Of the storages' elements, "little" where nothing is said, as torch.load takes it."""
        if f"{self._root}byteorder" not in self._entries:
            return "little"
        said = self.source(self.entry("byteorder"))
        order = said.take(min(said.left, 10))
        if order not in (b"little", b"big"):
            raise DamagedError(f"the byte order {order!r}")
        return order.decode()

    def source(self, entry: Entry) -> Source:
        """An entry's bytes, to be read from their beginning before anything else is."""
        self._file.seek(entry.start)
        return Source(self._file, entry.size)

    def storage(self, entry: Entry) -> torch.UntypedStorage:
        """An entry's bytes in memory of their own; all of them together are no more than the file."""
        self._left -= entry.size
        if self._left < 0:
            raise CheckpointError("refused: its storages lie over each other and are larger than the file")
        data = torch.UntypedStorage(entry.size)
        self._file.seek(entry.start)
        read_into(self._file, data)
        return data
