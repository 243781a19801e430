"""Which memory an address that goes to a kernel belongs to: that of a tensor, of a structure of ctypes, or of the name
that stands for a function's address.

Tensors that Python makes empty are filled with a pattern, by which what no kernel has written yet is known.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNSET = bytes((0xA5, 0xC5, 0xFF, 0xFF))
"""What four bytes hold before something is written: no number as float32, the same in `driver.c`."""
addressof = ctypes.addressof
"""The function itself, whatever stands in its place later."""
_OFTEN_ENOUGH = 8
"""Bytes of the pattern that are no coincidence."""


@dataclass(eq=False)
class Array:
    """Bytes from an address on, and the addresses that they hold, by their place."""

    start: int
    size: int
    addresses: dict[int, int] = field(default_factory=dict)

    def content(self) -> bytes:
        return ctypes.string_at(self.start, self.size)

    def put(self, content: bytes, before: bytes) -> None:
        """Write what differs from before, and nothing else: other threads may write beside it, and memory of a file
        cannot be written."""
        if content != before:
            there = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.start))
            new = np.frombuffer(content, dtype=np.uint8)
            changed = new != np.frombuffer(before, dtype=np.uint8)
            there[changed] = new[changed]


def is_unset(content: bytes) -> bool:
    """Whether it is the pattern of tensors that were made empty, throughout."""
    return len(content) >= _OFTEN_ENOUGH and content == (UNSET * (len(content) // 4 + 1))[: len(content)]


class Memory:
    """Remembers where the tensors and structures lie whose addresses were asked for.

    structures, names: by their addresses, kept alive.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[int, int]] = {}
        self.structures: dict[int, Any] = {}
        self.names: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def watch(self) -> None:
        """From now on, for good: it is for a process that runs tests and nothing else."""
        asked = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            self.note(address := asked(tensor), tensor)
            return address

        def remembered(structure: Any) -> int:
            self.structures[address := addressof(structure)] = structure
            return address

        Tensor.data_ptr = data_ptr  # type: ignore[assignment, method-assign]
        ctypes.addressof = remembered
        torch.empty, torch.empty_like = _filled(torch.empty), _filled(torch.empty_like)
        Tensor.new_empty = _filled(Tensor.new_empty)  # type: ignore[method-assign]

    def note(self, address: int, tensor: Tensor) -> None:
        """A tensor lies at an address."""
        self._tensors.pop(address, None)  # the newest one is the last
        self._tensors[address] = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())

    def name(self, function: str) -> int:
        """An address that stands for a function's."""
        for address, held in self.names.items():
            if held.value == function.encode():
                return address
        made = ctypes.create_string_buffer(function.encode())
        self.names[address := addressof(made)] = made
        return address

    def array_at(self, address: int) -> tuple[int, int]:
        """Address and size of the memory of the tensor that lies there, the newest one."""
        found = self._tensors.get(address)
        if found is not None:
            return found
        for start, size in reversed(self._tensors.values()):
            if start <= address < start + size:
                return start, size
        raise LookupError(f"no tensor whose address was asked for lies at {address:#x}")


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, whose tensors hold the pattern."""

    def filled(*arguments: Any, **named: Any) -> Tensor:
        tensor = make(*arguments, **named)
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            ctypes.memmove(storage.data_ptr(), UNSET * (storage.nbytes() // 4 + 1), storage.nbytes())
        return tensor

    return filled


def structures_of(thing: Any) -> Iterator[Any]:
    """A structure of ctypes and those that it points to and keeps alive."""
    if isinstance(thing, dict):
        yield from itertools.chain.from_iterable(map(structures_of, thing.values()))
    elif isinstance(thing, (tuple, list)):
        yield from itertools.chain.from_iterable(map(structures_of, thing))
    elif isinstance(thing, (ctypes.Structure, ctypes.Array)):
        yield thing
        yield from structures_of(thing._objects)
    elif isinstance(thing, ctypes._Pointer):
        yield from structures_of(thing._objects)


def addresses_of(thing: Any, start: int = 0) -> Iterator[tuple[int, int]]:
    """Place and value of each address that a structure holds, none left out but those of nothing."""
    kind = type(thing)
    if isinstance(thing, ctypes.Array):
        for i in range(len(thing)):
            if issubclass(kind._type_, (ctypes.Structure, ctypes.Array)):
                yield from addresses_of(thing[i], start + i * ctypes.sizeof(kind._type_))
        if kind._type_ is ctypes.c_void_p:
            yield from ((start + 8 * i, value) for i, value in enumerate(thing) if value)
        return
    for name, of, *_ in thing._fields_:
        at, value = start + getattr(kind, name).offset, getattr(thing, name)
        if issubclass(of, (ctypes.Structure, ctypes.Array)):
            yield from addresses_of(value, at)
        elif of is ctypes.c_void_p and value:
            yield at, value
        elif issubclass(of, ctypes._Pointer) and value:
            yield at, addressof(value.contents)


def arrays_of(structures: Iterable[Any]) -> list[Array]:
    """The structures' memory, each once."""
    found = {addressof(each): each for each in structures}
    return [Array(start, ctypes.sizeof(each), dict(addresses_of(each))) for start, each in found.items()]
