"""The structures of `program.h`, `program.c` and `steps.c`, and what runs them.

A structure holds addresses only: whoever makes one keeps the tensors behind it alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library
from ssm_mp.kernels.matrices import Matrix

STREAM, RESULT = -1, -2
"""In place of a place in the shared memory: what a branch adds to, and what a program gives besides."""


class Rows(ctypes.Structure):
    """Where a value lies."""

    _fields_ = (("at", c_int64), ("ld", c_int64), ("column", c_int64))


class Norm(ctypes.Structure):
    """LayerNorm, or RMSNorm where there is no bias, of `repeats` neighbouring pieces of each row."""

    _fields_ = (
        ("x", Rows), ("y", Rows), ("width", c_int64), ("repeats", c_int64), ("weight", c_void_p), ("bias", c_void_p),
        ("eps", c_float),
    )  # fmt: skip


class Product(ctypes.Structure):
    """Rows times a weight. adds: to what is there. laid: its bytes among weights that are laid out, or −1."""

    _fields_ = (("matrix", Matrix), ("x", Rows), ("y", Rows), ("adds", c_int64), ("laid", c_int64))


class Convolution(ctypes.Structure):
    """A causal depthwise convolution; `state`: the number of its last inputs."""

    _fields_ = (
        ("x", Rows), ("y", Rows), *((name, c_int64) for name in ("width", "kernel", "silu")),
        ("taps", c_void_p), ("bias", c_void_p), ("state", c_int64),
    )  # fmt: skip


class Scaled(ctypes.Structure):
    """Rows times a number. adds: to what is there."""

    _fields_ = (("x", Rows), ("y", Rows), ("width", c_int64), ("factor", c_float), ("adds", c_int64))


class Lookup(ctypes.Structure):
    """Rows of one or several weights by the ids of tokens, times a factor, with the rows of their positions added."""

    _fields_ = (
        ("blocks", POINTER(Matrix)), ("block_of", c_void_p), ("row_of", c_void_p), ("vocabulary", c_int64),
        ("width", c_int64), ("y", Rows), ("factor", c_float), ("positions", c_void_p),
    )  # fmt: skip


class SelectiveScan(ctypes.Structure):
    """`SelectiveScan` of mamba1.c; `state`: the number of its states."""

    _fields_ = (
        *((name, Rows) for name in ("a", "dt", "B", "C", "z", "y")), ("inner", c_int64), ("states", c_int64),
        *((name, c_void_p) for name in ("A2", "A2t", "D")), ("state", c_int64),
    )  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = (("run", c_void_p), ("scratch", c_void_p), ("what", c_void_p), ("part", c_int64))


class _Laid(ctypes.Structure):
    _fields_ = (("matrix", POINTER(Matrix)), ("at", c_int64))


class _Program(ctypes.Structure):
    _fields_ = (
        ("calls", POINTER(_Call)), ("laid", POINTER(_Laid)),
        *((name, c_int64) for name in ("count", "laid_count", "width", "results", "floats", "packed")),
    )  # fmt: skip


class _Tokens(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "position", "capacity", "few")),
        *((name, c_void_p) for name in ("ids", "stream", "result", "states", "memory", "seconds")),
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.program_bytes.argtypes = (POINTER(_Program), POINTER(_Tokens), c_int)
    found.program_bytes.restype = c_int64
    found.run_program.argtypes, found.run_program.restype = (POINTER(_Program), POINTER(_Tokens), c_int), None
    found.packed_bytes.argtypes, found.packed_bytes.restype = (POINTER(Matrix),), c_int64
    return found


def packed_bytes(matrix: Matrix) -> int:
    """Bytes of a weight that is laid out for products of many rows."""
    return int(_kernels().packed_bytes(byref(matrix)))


def _address(function: str | None) -> int | None:
    return None if function is None else ctypes.cast(getattr(_kernels(), function), c_void_p).value


class Calls:
    """Calls in the order in which they run, ready to be run any number of times, by several threads at once."""

    def __init__(self, width: int) -> None:
        """`width`: of a row of the stream."""
        self._calls: list[_Call] = []
        self._whats: list[ctypes.Structure] = []
        self._laid: list[_Laid] = []
        self._structure = _Program(width=width)

    def append(self, kernel: str, what: ctypes.Structure, part: int) -> None:
        """`kernel`: C's `<kernel>_run`, and `<kernel>_scratch` where there is one; part: whose time it is, or −1."""
        self._whats.append(what)
        scratch = f"{kernel}_scratch"
        has_scratch = hasattr(_kernels(), scratch)
        self._calls.append(
            _Call(_address(f"{kernel}_run"), _address(scratch if has_scratch else None), ctypes.addressof(what), part)
        )

    def lay(self, matrix: Matrix) -> int:
        """Have a weight laid out before rows that are many; where, in bytes."""
        at = int(self._structure.packed)
        self._laid.append(_Laid(ctypes.pointer(matrix), at))
        self._structure.packed = at + -(-packed_bytes(matrix) // 64) * 64
        return at

    def close(self, floats: int, results: int) -> None:
        """No call comes any more. Numbers of a row in the shared memory, and of a row of results."""
        program = self._structure
        program.calls, program.count = (_Call * len(self._calls))(*self._calls), len(self._calls)
        program.laid, program.laid_count = (_Laid * len(self._laid))(*self._laid), len(self._laid)
        program.floats, program.results = floats, results

    def run(
        self, stream: Tensor, result: Tensor | None, states: Sequence[Tensor], position: int, capacity: int, *,
        few: bool, seconds: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The stream `[b, l, d]` is changed in place, as are the states.

        position: tokens of each sequence before these. capacity: tokens that states have room for. few: multiply
        weights as they are stored. seconds: float64, to which the time of each part is added.
        """
        self.prepared(stream, result, states, capacity, few=few, seconds=seconds).run(stream, position)

    def prepared(
        self, stream: Tensor, result: Tensor | None, states: Sequence[Tensor], capacity: int, *,
        few: bool, seconds: Tensor | None = None,
    ) -> Prepared:  # fmt: skip
        """`run` for many streams of this one's shape, with the same result, states and threads."""
        b, length = stream.shape[:2]
        held = (c_void_p * len(states))(*(state.data_ptr() for state in states))
        tokens = _Tokens(
            b, length, 0, capacity, few, None, None, None if result is None else result.data_ptr(),
            ctypes.addressof(held), None, None if seconds is None else seconds.data_ptr(),
        )  # fmt: skip
        threads = torch.get_num_threads()
        size = _kernels().program_bytes(byref(self._structure), byref(tokens), threads)
        memory = torch.empty(size, dtype=torch.int8)
        tokens.memory = memory.data_ptr()
        return Prepared(self._structure, tokens, threads, (self, result, states, held, memory, seconds))


class Prepared:
    """Calls with all that they work in, for one thread at a time."""

    def __init__(self, program: _Program, tokens: _Tokens, threads: int, held: object) -> None:
        """Made by `Calls.prepared`; held: what the addresses are of."""
        self._program, self._tokens, self._threads, self._held = byref(program), tokens, threads, held

    def run(self, stream: Tensor, position: int, ids: Tensor | None = None) -> None:
        """As `Calls.run`; ids: int64 `[b, l]`, contiguous, of a program that begins with them."""
        self._tokens.ids = None if ids is None else ids.data_ptr()
        self._tokens.stream, self._tokens.position = stream.data_ptr(), position
        _kernels().run_program(self._program, byref(self._tokens), self._threads)
