"""A pickle machine of our own: plain values and inert objects, and nothing is ever imported.

Source of the opcodes: `pickletools` of Python's standard library. A length is compared with what is left of the data
before anything is allocated; what is called by name is decided by `known.py`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import BinaryIO, cast

from ssm_mp.errors import CheckpointError
from ssm_mp.files.allowance import Allowance
from ssm_mp.files.inert import DamagedError, Instance, Symbol
from ssm_mp.files.known import Known

_DIGITS, _NUMBER_BYTES, _NAME = 700, 256, 1000
"""The longest integer, as text and as bytes, and the longest name."""
_LIST, _DICT, _FIRST_ITEM, _SET, _TUPLE, _OBJECT = 88, 64, 184, 216, 48, 200
"""Bytes that CPython takes for containers."""


class Source:
    """Bytes of a file from where it stands, of which only `left` may be read."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self.left = file, left

    def take(self, count: int) -> bytes:
        """The next `count` bytes; raises DamagedError where there are not so many."""
        if not 0 <= count <= self.left:
            raise DamagedError(f"a value of {count:,} bytes where {self.left:,} are left")
        data = self._file.read(count)
        if len(data) != count:
            raise DamagedError("it ends early")
        self.left -= count
        return data

    def line(self, longest: int) -> bytes:
        """The next line without its end; raises DamagedError where it is longer than `longest` bytes."""
        data = self._file.readline(min(self.left, longest + 1))
        if data[-1:] != b"\n":
            raise DamagedError("a line without an end")
        self.left -= len(data)
        return data[:-1]


class Machine:
    """Reads one pickle, once."""

    def __init__(
        self, source: Source, known: Known, allowance: Allowance, persistent: Callable[[object], object]
    ) -> None:
        self._source, self._known, self._allowance, self._persistent = source, known, allowance, persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: list[object] = []
        self._sparse: dict[int, object] = {}
        self._symbols: dict[tuple[str, str], Symbol] = {}
        self._version = 0
        self._operations = self._plain() | self._texts() | self._containers() | self._objects()

    def load(self) -> object:
        """The pickle's value; the source stands behind it. Raises DamagedError and CheckpointError."""
        take, operations = self._source.take, self._operations
        try:
            while (code := take(1)) != b".":
                operation = operations.get(code)
                if operation is None:
                    raise DamagedError(f"no pickle has the operation {code!r}")
                operation()
            return self._stack.pop()
        except (IndexError, KeyError):
            raise DamagedError("an operation without its operands") from None
        except (UnicodeDecodeError, struct.error, ValueError, OverflowError) as error:
            raise DamagedError(f"a value that cannot be decoded ({type(error).__name__})") from None
        finally:  # the operations refer to this machine: without this, tensors would live until a garbage collection
            self._operations = {}
            self._memo, self._sparse, self._stack = [], {}, []

    def _plain(self) -> dict[bytes, Callable[[], None]]:
        """Numbers and constants, protocols 0 to 5."""
        push, take, number = self._push, self._source.take, self._number
        return {
            b"\x80": self._protocol,
            b"\x95": lambda: self._check_frame(number(8)),
            b"N": lambda: push(None),
            b"\x88": lambda: push(True),
            b"\x89": lambda: push(False),
            b"I": lambda: push(_integer(self._source.line(_DIGITS))),
            b"L": lambda: push(_integer(self._source.line(_DIGITS).removesuffix(b"L"))),
            b"F": lambda: push(float(self._source.line(_DIGITS))),
            b"J": lambda: push(int.from_bytes(take(4), "little", signed=True)),
            b"K": lambda: push(take(1)[0]),
            b"M": lambda: push(number(2)),
            b"\x8a": lambda: push(self._long(number(1))),
            b"\x8b": lambda: push(self._long(number(4))),
            b"G": lambda: push(struct.unpack(">d", take(8))[0]),
        }

    def _texts(self) -> dict[bytes, Callable[[], None]]:
        push, take, number, line = self._push, self._source.take, self._number, self._source.line
        return {
            b"V": lambda: push(line(self._source.left).decode("raw-unicode-escape")),
            b"\x8c": lambda: push(take(number(1)).decode("utf-8", "surrogatepass")),
            b"X": lambda: push(take(number(4)).decode("utf-8", "surrogatepass")),
            b"\x8d": lambda: push(take(number(8)).decode("utf-8", "surrogatepass")),
            b"C": lambda: push(take(number(1))),
            b"B": lambda: push(take(number(4))),
            b"\x8e": lambda: push(take(number(8))),
            b"\x96": lambda: push(take(number(8))),  # a bytearray, as bytes
            b"U": lambda: push(_old_text(take(number(1)))),
            b"T": lambda: push(_old_text(take(number(4)))),
            b"S": lambda: push(_old_text(_unquoted(line(self._source.left)))),
        }

    def _containers(self) -> dict[bytes, Callable[[], None]]:
        push, pop, above = self._push, self._stack.pop, self._above_mark
        return {
            b"(": lambda: self._marks.append(len(self._stack)),
            b"0": self._drop,
            b"1": lambda: above().clear(),
            b"2": lambda: push(self._stack[-1]),
            b"]": lambda: self._push_list([]),
            b"l": lambda: self._push_list(above()),
            b"}": lambda: self._push_dict([]),
            b"d": lambda: self._push_dict(above()),
            b"\x8f": self._push_set,
            b"\x91": lambda: push(self._frozen(above())),
            b")": lambda: push(()),
            b"t": lambda: self._push_tuple(above()),
            b"\x85": lambda: self._push_tuple(self._last(1)),
            b"\x86": lambda: self._push_tuple(self._last(2)),
            b"\x87": lambda: self._push_tuple(self._last(3)),
            b"a": lambda: self._append([pop()]),
            b"e": lambda: self._append(above()),
            b"s": lambda: self._set(self._last(2)),
            b"u": lambda: self._set(above()),
            b"\x90": lambda: self._add(above()),
        }

    def _objects(self) -> dict[bytes, Callable[[], None]]:
        push, pop, number = self._push, self._stack.pop, self._number
        return {
            b"p": lambda: self._remember(_integer(self._source.line(_DIGITS))),
            b"q": lambda: self._remember(number(1)),
            b"r": lambda: self._remember(number(4)),
            b"\x94": lambda: self._remember(len(self._memo) + len(self._sparse)),
            b"g": lambda: push(self._recall(_integer(self._source.line(_DIGITS)))),
            b"h": lambda: push(self._recall(number(1))),
            b"j": lambda: push(self._recall(number(4))),
            b"c": lambda: push(self._symbol(self._source.line(_NAME).decode(), self._source.line(_NAME).decode())),
            b"\x93": lambda: push(self._symbol(*self._last(2))),
            b"i": self._construct_named,
            b"o": self._construct,
            b"R": lambda: self._called(*self._last(2)),
            b"\x81": lambda: self._made(*self._last(2)),
            b"\x92": lambda: self._made(*self._last(3)),
            b"b": lambda: self._build(pop()),
            b"Q": lambda: push(self._persistent(pop())),
            b"P": self._refuse_persistent,
            b"\x82": self._refuse_extension,
            b"\x83": self._refuse_extension,
            b"\x84": self._refuse_extension,
        }

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _number(self, size: int) -> int:
        return int.from_bytes(self._source.take(size), "little")

    def _long(self, size: int) -> int:
        if size > _NUMBER_BYTES:
            raise CheckpointError(f"refused: an integer of {size:,} bytes")
        return int.from_bytes(self._source.take(size), "little", signed=True)

    def _protocol(self) -> None:
        self._version = self._number(1)
        if self._version > 5:
            raise DamagedError(f"pickle protocol {self._version}, and 5 is the last")

    def _check_frame(self, size: int) -> None:
        if size > self._source.left:
            raise DamagedError(f"a frame of {size:,} bytes where {self._source.left:,} are left")

    def _drop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _above_mark(self) -> list[object]:
        at = self._marks.pop()
        if at > len(self._stack):
            raise DamagedError("an operation without its operands")
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _last(self, count: int) -> list[object]:
        if len(self._stack) < count:
            raise DamagedError("an operation without its operands")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _push_list(self, values: list[object]) -> None:
        self._allowance.take(_LIST)
        self._stack.append(values)

    def _push_dict(self, pairs: list[object]) -> None:
        self._allowance.take(_DICT)
        self._stack.append({})
        if pairs:
            self._set(pairs)

    def _push_set(self) -> None:
        self._allowance.take(_SET)
        self._stack.append(set())

    def _push_tuple(self, values: list[object]) -> None:
        self._allowance.take(_TUPLE + 8 * len(values))
        self._stack.append(tuple(values))

    def _frozen(self, values: list[object]) -> frozenset[object]:
        self._allowance.take(_SET)
        return frozenset(map(self._allowance.key, values))

    def _append(self, values: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is Instance:
            if target.listed is None:
                self._allowance.take(_LIST)
                target.listed = []
            target.listed += values
        elif type(target) is list:
            target += values
        else:
            raise DamagedError(f"items for a {_kind(target)}, which is no list")

    def _set(self, pairs: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is Instance:
            if target.items is None:
                self._allowance.take(_DICT)
                target.items = {}
            target = target.items
        if type(target) is not dict or len(pairs) % 2:
            raise DamagedError(f"keys for a {_kind(target)}")
        if not target:
            self._allowance.take(_FIRST_ITEM)
        key = self._allowance.key
        for at in range(0, len(pairs), 2):
            target[key(pairs[at])] = pairs[at + 1]

    def _add(self, values: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is Instance:
            self._append(values)
        elif type(target) is set:
            target.update(map(self._allowance.key, values))
        else:
            raise DamagedError(f"members for a {_kind(target)}, which is no set")

    def _remember(self, at: int) -> None:
        """The top of the stack under a number; the numbers come from the file, so that nothing is as long as they."""
        value = self._stack[-1]
        if 0 <= at < len(self._memo):
            self._memo[at] = value
        elif at == len(self._memo) and at not in self._sparse:
            self._memo.append(value)
        else:
            self._allowance.take(_DICT)
            self._sparse[at] = value

    def _recall(self, at: int) -> object:
        return self._memo[at] if 0 <= at < len(self._memo) else self._sparse[at]

    def _symbol(self, module: object, name: object) -> Symbol:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > _NAME:
            raise DamagedError("a name that is no text")
        found = self._symbols.get((module, name))
        if found is None:
            if not (module + name).isprintable():  # it is shown to people
                raise DamagedError("a name that is no text")
            self._allowance.take(_OBJECT)
            found = self._symbols[module, name] = Symbol.named(module, name, self._version)
        return found

    def _construct_named(self) -> None:
        symbol = self._symbol(self._source.line(_NAME).decode(), self._source.line(_NAME).decode())
        self._called(symbol, tuple(self._above_mark()))

    def _construct(self) -> None:
        values = self._above_mark()
        self._called(values[0], tuple(values[1:]))

    def _called(self, function: object, arguments: object) -> None:
        if type(arguments) is not tuple:
            raise DamagedError("a call without arguments")
        self._allowance.take(_OBJECT)
        self._stack.append(self._known.call(function, arguments))

    def _made(self, symbol: object, arguments: object, named: object = None) -> None:
        if type(arguments) is not tuple or not (named is None or type(named) is dict):
            raise DamagedError("a construction without arguments")
        self._allowance.take(_OBJECT)
        self._stack.append(self._known.make(symbol, arguments, cast("dict[object, object] | None", named)))

    def _build(self, state: object) -> None:
        self._known.build(self._stack[-1], state)

    def _refuse_persistent(self) -> None:
        raise CheckpointError("refused: it refers to something outside of the file that is no storage of a tensor")

    def _refuse_extension(self) -> None:
        raise CheckpointError("refused: it names objects by numbers of copyreg's extension registry")


def _integer(text: bytes) -> int | bool:
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)


def _old_text(data: bytes) -> str | bytes:
    """A `str` of Python 2: a text where it is one, else bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _unquoted(line: bytes) -> bytes:
    text = line.strip()
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
        raise DamagedError("a text without quotes")
    return codecs.escape_decode(text[1:-1])[0]


def _kind(value: object) -> str:
    return type(value).__name__
