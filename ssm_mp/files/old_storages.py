"""Storages of torch's old format, before its zip archives: behind the pickle that names them."""

from __future__ import annotations

import sys
from typing import BinaryIO

import torch

from ssm_mp.files.inert import DamagedError
from ssm_mp.files.pickled import Source
from ssm_mp.files.storages import Root, Storage, element_type, read_into, storage_identity


class OldStorages:
    """Storages of the old format: named in the pickle, and filled from what stands behind it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = source.left
        self._held: dict[str, Storage] = {}

    def find(self, identity: object) -> object:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] in ("module", b"module"):
            return identity[1]  # a class, with its source
        kind, key, view, count = storage_identity(identity, 6)
        dtype = element_type(kind)
        found = self._held.get(key)
        if found is None:
            size = count * dtype.itemsize
            self._left -= size
            if self._left < 0:
                raise DamagedError(f"storage {key[:40]} of {count:,} elements is larger than the file")
            root = Root(size, lambda: torch.UntypedStorage(size))
            root.bytes()
            found = self._held[key] = Storage(root, dtype, count)
        if (found.dtype, found.count) != (dtype, count):
            raise DamagedError(f"storage {key[:40]} has two sizes")
        return found if view is None else _part(found, view)

    def fill(self, file: BinaryIO, keys: object) -> None:
        """Read every storage in the file's order: its number of elements, then these, the lowest byte first."""
        if not isinstance(keys, list) or set(keys) != set(self._held) or len(keys) != len(self._held):
            raise DamagedError("other storages than its tensors have")
        for key in keys:
            storage = self._held[key]
            count = int.from_bytes(self._source.take(8), "little")
            if count != storage.count or storage.root.size > self._source.left:
                raise DamagedError(f"storage {key[:40]} has {count:,} elements, and {storage.count:,} were saved")
            data = storage.root.bytes()
            read_into(file, data)
            self._source.left -= storage.root.size
            if sys.byteorder == "big":
                data.byteswap(storage.dtype)


def _part(whole: Storage, view: object) -> Storage:
    """A storage that is a part of another: (its key, first element, elements)."""
    if (
        not isinstance(view, tuple)
        or len(view) != 3
        or not all(type(value) is int and value >= 0 for value in view[1:])
    ):
        raise DamagedError("a part of a storage without its bounds")
    _, first, count = view
    if first + count > whole.count:
        raise DamagedError(f"a part that ends at element {first + count:,} of a storage of {whole.count:,}")
    return Storage(whole.root, whole.dtype, count, first * whole.dtype.itemsize)
