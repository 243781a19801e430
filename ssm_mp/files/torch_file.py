"""Read what `torch.save` wrote, without torch.load: `read_torch_file(path)` → plain values, tensors and records.

Formats: the zip archive of torch ≥ 1.6, the file of pickles before it, and a pickle alone. Nothing in a file is
imported or called (`known.py`), and what is read takes a bounded multiple of the file's size.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ssm_mp.errors import CheckpointError
from ssm_mp.files.allowance import Allowance
from ssm_mp.files.archive import Archive
from ssm_mp.files.inert import DamagedError
from ssm_mp.files.known import Known
from ssm_mp.files.old_storages import OldStorages
from ssm_mp.files.pickled import Machine, Source
from ssm_mp.files.settled import Settling
from ssm_mp.files.storages import Root, Storage, Tensors, element_type, storage_identity

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
"""First two pickles of torch's old format."""


@dataclass(frozen=True)
class TorchFile:
    """A file's content: dict, list, tuple, set, frozenset, str, bytes, numbers, None, `torch.Tensor` and `Record`.

    Tensors are on the CPU, without gradients; equal views are one tensor, tied ones share their memory. `left_out`:
    the classes that became records, sorted.
    """

    content: object
    left_out: tuple[str, ...]


def read_torch_file(path: Path) -> TorchFile:
    """Everything in a `.pt`, `.pth`, `.bin` or `.ckpt` file.

    Raises CheckpointError for a file that is damaged, of another format, or that would run or unfold something.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file")
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise  # of the machine, not of the file: what a file may take is bounded
    except Exception as error:  # damaged data can make zipfile and torch raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable torch file, truncated or renamed? ({reason})") from None


def _read(file: BinaryIO, size: int) -> TorchFile:
    head = file.read(512)
    file.seek(0)
    if head[:2] == b"PK":
        return _read_archive(file, size)
    if head[:1] == b"\x80":
        return _read_pickles(file, size)
    if head[257:262] == b"ustar" and tarfile.is_tarfile(file):
        raise CheckpointError(
            "a tar file, as torch before 0.1.10 wrote them, or a packed one; load it with that version and save its "
            "state_dict() again, best as .safetensors"
        )
    advice = "; it looks like a .safetensors file, rename it" if head[8:9] == b"{" else ", truncated or renamed?"
    raise CheckpointError(f"not a torch file{advice}")


def _read_archive(file: BinaryIO, size: int) -> TorchFile:
    """The zip archive: one pickle, and an entry for each storage."""
    archive = Archive(file, size)
    entry = archive.entry("data.pkl")
    swapped = archive.byte_order() != sys.byteorder
    tensors, allowance = Tensors(size), Allowance(entry.size)
    roots: dict[str, Root] = {}

    def storage(identity: object) -> Storage:
        kind, key, _, count = storage_identity(identity, 5)
        dtype = element_type(kind)
        held = archive.entry(f"data/{key}")
        if not count * dtype.itemsize <= held.size < (count + 1) * dtype.itemsize:
            raise DamagedError(f"storage {key} has {held.size:,} bytes, and {count:,} elements were saved")

        def read() -> torch.UntypedStorage:
            data = archive.storage(held)
            if swapped:
                data.byteswap(dtype)
            return data

        return Storage(roots.setdefault(key, Root(held.size, read)), dtype, count)

    known = Known(tensors, allowance, lambda data: _lone_storage(data, tensors, allowance))
    data = io.BytesIO(archive.source(entry).take(entry.size))  # storages are read from the file meanwhile
    machine = Machine(Source(data, entry.size), known, allowance, storage)
    return _settled(machine.load(), tensors, allowance, entry.size)


def _read_pickles(file: BinaryIO, size: int) -> TorchFile:
    """The old format, or any other pickle."""
    tensors, allowance, source = Tensors(size), Allowance(size), Source(file, size)
    known = Known(tensors, allowance, lambda data: _lone_storage(data, tensors, allowance))
    return _settled(_pickles(file, source, known, allowance), tensors, allowance, size)


def _settled(content: object, tensors: Tensors, allowance: Allowance, size: int) -> TorchFile:
    settling = Settling(tensors, allowance, size)
    settled = settling.settle(content)
    tensors.close()
    return TorchFile(settled, tuple(sorted(settling.kinds)))


def _lone_storage(data: bytes, tensors: Tensors, allowance: Allowance) -> object:
    """The storage that an ordinary pickle has inside as a whole file of the old format."""
    tensors.take(len(data))

    def refuse(_: bytes) -> object:
        raise CheckpointError("refused: torch files within each other")

    source = Source(file := io.BytesIO(data), len(data))
    return _pickles(file, source, Known(tensors, allowance, refuse), allowance)


def _pickles(file: BinaryIO, source: Source, known: Known, allowance: Allowance) -> object:
    """The content of torch's old format; of any other pickle, its first value."""
    value = Machine(source, known, allowance, _refuse).load()
    if value != _MAGIC or type(value) is not int:
        return value
    if Machine(source, known, allowance, _refuse).load() != _VERSION:
        raise DamagedError("another version of torch's old format")
    Machine(source, known, allowance, _refuse).load()  # facts about the machine that saved it
    storages = OldStorages(source)
    content = Machine(source, known, allowance, storages.find).load()
    storages.fill(file, Machine(source, known, allowance, _refuse).load())
    return content


def _refuse(_: object) -> object:
    raise CheckpointError("refused: it refers to something outside of the file that is no storage of a tensor")
