"""Kernels that another process computes: on another CPU by an emulator, or watched by valgrind.

`Elsewhere` stands for the loaded library. What a call's arguments point to is sent along, and what comes back is put in
its place, so that whoever calls notices nothing.

    python -m tests.ssm_mp.kernels.elsewhere LIBRARY LOG DRIVER... -- TESTS...

runs tests on such kernels; `driver.c` says what the other process does.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tests.ssm_mp.kernels.memory import Array, Memory, addressof, arrays_of, is_unset, structures_of

_FUNCTION = -1
"""In place of how far from an array's start: the array is a function's name, and its address is meant."""


class Elsewhere:
    """A library of kernels in another process, begun anew where it ended.

    command: of the driver. log: where it says what it found wrong, besides its standard error.
    """

    def __init__(self, command: Sequence[str], library: Path, log: Path, memory: Memory) -> None:
        self.calls = 0
        self.log, self.memory = log, memory
        self.lock = Lock()
        self._command = [*command, str(library)]
        self._complaints = log.with_suffix(".stderr")
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = 0

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        with self.lock:
            if not self.ask(b"?" + _text(name), 8)[0]:
                raise AttributeError(name)
        found = _Kernel(self, name)
        setattr(self, name, found)
        return found

    def ask(self, request: bytes, size: int) -> tuple[Any, bytes]:
        """The first number of an answer of so many bytes, and the rest."""
        if self._process is None:
            with self._complaints.open("ab") as complaints:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints
                )
            self._errors = 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is said below
        answer = self._process.stdout.read(size)
        if len(answer) != size:
            code, self._process = self._process.wait(), None
            raise AssertionError(f"a kernel ended its process, code {code}:\n{self._said()}")
        return struct.unpack_from("<q", answer)[0], answer[8:]

    def require_no_more(self, errors: int) -> None:
        """Raise where valgrind has found more errors than before the last call."""
        before, self._errors = self._errors, errors
        assert errors == before, f"{errors - before} errors:\n{self._said()}"

    def close(self) -> int:
        """The exit status of the other process, once it has ended; 0 where it was not begun."""
        if self._process is None:
            return 0
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()

    def _said(self) -> str:
        texts = (path.read_text(errors="replace") for path in (self.log, self._complaints) if path.exists())
        return "\n".join(texts)[-4000:]


class _Kernel:
    """One function of the library, with its types declared as those of ctypes are."""

    def __init__(self, library: Elsewhere, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> int | None:
        with self._library.lock:
            return self._called(*arguments)

    def _called(self, *arguments: Any) -> int | None:
        assert len(arguments) >= len(self.argtypes), f"{self._name}: {len(arguments)} arguments"
        types = [*self.argtypes, *[ctypes.c_int] * (len(arguments) - len(self.argtypes))]
        call = _Call(self._library.memory)
        packed = [call.argument(of, value) for of, value in zip(types, arguments, strict=True)]
        arrays = call.packed()  # once all of them are known
        request = b"!" + _text(self._name) + arrays + _numbers(len(packed)) + b"".join(packed)
        size = sum(array.size for array in call.arrays)
        result, rest = self._library.ask(request, 16 + size)
        self._library.calls += 1
        call.put(rest[8:])
        self._library.require_no_more(struct.unpack_from("<q", rest)[0])
        return None if self.restype is None else self.restype(result).value


class _Call:
    """The memory of one call."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.arrays: list[Array] = []
        self._sent: list[bytes] = []

    def argument(self, of: Any, value: Any) -> bytes:
        """One argument, as `driver.c` reads it; memory that it points to is noted."""
        if of is ctypes.c_float:
            return _numbers(ord("f")) + struct.pack("<fiq", value, 0, 0)
        if of is ctypes.c_void_p:
            return _numbers(ord("p"), *self.place(value))
        if isinstance(of, type) and issubclass(of, ctypes._Pointer):
            if value is None:
                return _numbers(ord("p"), *self.place(None))
            structure = getattr(value, "_obj", value)  # of `byref`
            self._add(arrays_of(structures_of(structure)))
            return _numbers(ord("p"), *self.place(addressof(structure)))
        assert of in (ctypes.c_int, ctypes.c_int64), f"an argument of type {of}"
        return _numbers(ord("i"), int(value), 0)

    def place(self, address: int | None) -> tuple[int, int]:
        """The number of the array that holds an address, and how far from its start."""
        if not address:
            return -1, 0
        name, structure = self._memory.names.get(address), self._memory.structures.get(address)
        if name is not None:
            self._add([Array(address, len(name))])
        elif structure is not None:
            self._add(arrays_of(structures_of(structure)))
        for which, array in enumerate(self.arrays):
            if array.start <= address < array.start + max(1, array.size):  # one may be empty
                return which, _FUNCTION if name is not None else address - array.start
        self._add([Array(*self._memory.array_at(address))])
        return len(self.arrays) - 1, address - self.arrays[-1].start

    def _which(self, start: int) -> int | None:
        return next((i for i, array in enumerate(self.arrays) if array.start == start), None)

    def packed(self) -> bytes:
        """Every array, and the addresses inside of them."""
        before: list[Array] = []
        while before != self.arrays:  # each may point to further ones
            before = list(self.arrays)
            for address in [address for array in before for address in array.addresses.values()]:
                self.place(address)
        places = [
            (which, at, *self.place(address))
            for which, array in enumerate(self.arrays)
            for at, address in array.addresses.items()
        ]
        parts = [_numbers(len(self.arrays))]
        self._sent = [array.content() for array in self.arrays]
        for array, content in zip(self.arrays, self._sent, strict=True):
            unset = is_unset(content)
            parts += [_numbers(array.size, not unset), b"" if unset else content]
        return b"".join([*parts, _numbers(len(places)), *(_numbers(*place) for place in places)])

    def put(self, content: bytes) -> None:
        """What the other process made of the tensors; structures stay as they were."""
        at = 0
        for array, before in zip(self.arrays, self._sent, strict=True):
            if not array.addresses:
                array.put(content[at : at + array.size], before)
            at += array.size

    def _add(self, arrays: Sequence[Array]) -> None:
        for array in arrays:
            which = self._which(array.start)
            if which is None:
                self.arrays.append(array)
            elif array.size > self.arrays[which].size:  # a structure where its first part was known
                self.arrays[which] = array


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _text(name: str) -> bytes:
    return _numbers(len(name)) + name.encode()


def main(library: str, log: str, *rest: str) -> int:
    """Run tests on kernels elsewhere; the exit status is pytest's, or 99 where the driver found something wrong."""
    import pytest
    from hypothesis import settings

    from ssm_mp.kernels import compiler
    from tests.ssm_mp.kernels import builds

    memory = Memory()
    memory.watch()
    between = rest.index("--")
    kernels = Elsewhere(rest[:between], Path(library), Path(log), memory)
    compiler.library = lambda: kernels  # type: ignore[assignment,return-value]  # before any other module takes it
    from ssm_mp.kernels import program

    program._address = lambda function: None if function is None else memory.name(function)
    settings.register_profile("fewest", deadline=None, max_examples=4)
    found = pytest.main([*builds.options("fewest"), *rest[between + 1 :]])
    print(f"{kernels.calls} calls", flush=True)
    return int(found) or (99 if kernels.close() or not kernels.calls else 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
