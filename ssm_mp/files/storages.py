"""Tensors as views of a file's storages: each storage is read once, each view is checked against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.inert import DamagedError, Instance, Symbol

_TIMES, _ANY_FILE = 4, 1 << 16
"""Elements of all different tensors take at most so many times the file's size, and any file so many bytes."""
_MOST_DIMENSIONS, _LARGEST = 64, 1 << 62

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
"""Names of torch's storages → the type of an element; of quantised ones, the type that holds it."""

DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""Types by their names, `torch.float32`, as they are pickled."""


class Root:
    """Bytes of a file that storages view, read when a tensor first needs them."""

    def __init__(self, size: int, read: Callable[[], torch.UntypedStorage]) -> None:
        self.size, self._read = size, read
        self._held: torch.UntypedStorage | None = None

    def bytes(self) -> torch.UntypedStorage:
        if self._held is None:
            self._held = self._read()
        return self._held


@dataclass(frozen=True, eq=False)
class Storage:
    """Elements of one type: `count` of them, from byte `start` of a root."""

    root: Root
    dtype: torch.dtype
    count: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class Marked:
    """A tensor that is meant conjugated or negated; its values may be read later than this is made."""

    tensor: Tensor
    conjugated: bool
    negated: bool

    def resolved(self) -> Tensor:
        """A copy with the values that are meant."""
        tensor = self.tensor.conj().resolve_conj() if self.conjugated else self.tensor
        return -tensor if self.negated else tensor


def element_type(symbol: object) -> torch.dtype:
    """The element type of a storage by the name of its class; raises DamagedError for a class that is no storage."""
    name = symbol.name if isinstance(symbol, Symbol) else ""
    if not isinstance(symbol, Symbol) or symbol.module.split(".")[0] != "torch" or name not in _STORAGES:
        raise DamagedError("a storage of unknown type")
    return _STORAGES[name]


def storage_identity(identity: object, parts: int) -> tuple[object, str, object, int]:
    """A storage's type, key, last part and number of elements, of what a pickle says of it in so many parts."""
    if not isinstance(identity, tuple) or len(identity) != parts or identity[0] not in ("storage", b"storage"):
        raise CheckpointError("refused: it refers to something outside of the file that is no storage of a tensor")
    _, kind, key, _, count = identity[:5]
    if isinstance(key, bytes):
        key = key.decode("latin-1")
    if not isinstance(key, str) or not key.isprintable() or type(count) is not int or not 0 <= count < _LARGEST:
        raise DamagedError("a storage without a key and a size")
    return kind, key, identity[-1], count


def read_into(file: BinaryIO, data: torch.UntypedStorage) -> None:
    """Fill a storage from where the file stands; raises DamagedError where the file ends before."""
    if len(data) == 0:
        return
    buffer = torch.empty(0, dtype=torch.uint8).set_(data).numpy().data
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise DamagedError("it ends early")
        buffer = buffer[count:]


class Tensors:
    """Makes a file's tensors; the same view twice is the same tensor. `size`: bytes of the file."""

    def __init__(self, size: int) -> None:
        self._left = _TIMES * size + _ANY_FILE
        self._views: dict[tuple[object, ...], Tensor] = {}

    def take(self, size: int) -> None:
        """Raises CheckpointError where a small file would make large tensors."""
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"refused: its tensors are more than {_TIMES} times as large as the file")

    def close(self) -> None:
        """Keep no tensor any longer: whoever has the content is its only owner."""
        self._views.clear()

    def whole(self, storage: Storage) -> Tensor:
        """All elements of a storage, `[count]`."""
        return self.view(storage, 0, (storage.count,), (1,))

    def view(
        self, storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of `size` and `stride` in elements from element `offset` of a storage.

        Raises DamagedError where it reaches beyond the storage, CheckpointError where it repeats its elements.
        """
        if not isinstance(storage, Storage):
            raise DamagedError("a tensor without a storage")
        dtype = storage.dtype if dtype is None else dtype
        sizes, strides, first = _integers(size), _integers(stride), _integers((offset,))[0]
        if len(sizes) != len(strides) or len(sizes) > _MOST_DIMENSIONS:
            raise DamagedError(f"a tensor of {len(sizes)} dimensions and {len(strides)} strides")
        width = dtype.itemsize
        held = storage.count * storage.dtype.itemsize // width
        count = math.prod(sizes)
        last = first + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if math.prod(n for n in sizes if n) > _LARGEST or storage.start % width:
            raise DamagedError(f"a tensor of size {sizes}")
        if (last if count else 0) >= held and count:
            raise DamagedError(f"a tensor that ends at element {last + 1:,} of a storage of {held:,}")
        if count > held:
            raise CheckpointError(
                f"refused: a tensor of {count:,} elements in a storage of {held:,}; save it as .contiguous()"
            )
        if not count:
            first = 0
        key = (id(storage.root), storage.start, dtype, first, sizes, strides)
        if key not in self._views:
            self.take(count * width)
            empty = torch.empty(0, dtype=dtype)
            self._views[key] = empty.set_(storage.root.bytes(), storage.start // width + first, sizes, strides)
        return self._views[key]


def without_values(call: Symbol, shape: object, dtype: object = None) -> Instance:
    """What stands for a tensor that is no dense array of plain numbers: sparse, quantised, on the meta device."""
    items: dict[object, object] = {"shape": shape}
    if isinstance(dtype, Symbol):
        items["dtype"] = dtype
    return Instance(call, items=items)


def _integers(values: object) -> tuple[int, ...]:
    """Sizes or strides, all of them whole numbers from 0."""
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMENSIONS:
        raise DamagedError("a tensor without sizes")
    if not all(type(value) is int and 0 <= value < _LARGEST for value in values):
        raise DamagedError("a tensor whose sizes are no whole numbers")
    return tuple(values)
