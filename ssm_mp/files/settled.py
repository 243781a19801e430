"""The last step of reading a pickle: inert objects become records, storages tensors, and nothing holds itself."""

from __future__ import annotations

from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files import numpy_values
from ssm_mp.files.allowance import Allowance
from ssm_mp.files.inert import Instance, Symbol
from ssm_mp.files.numpy_values import NumpyArray, NumpyType
from ssm_mp.files.record import Record
from ssm_mp.files.storages import DTYPES, Marked, Storage, Tensors

_DEEPEST = 100
"""Containers within each other, so that whoever walks the content needs no stack of his own."""
_EACH_BYTE, _ANY_FILE = 8, 1_000_000
"""Values for each byte of the pickle, where one that is held twice counts twice, and for any pickle."""
_EACH_FIELD, _EACH_CONTAINER = 128, 224
"""Bytes that a field takes in a dictionary of its own, and what is remembered of a container, about."""
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, Tensor, Record})
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})

_INSIDE = {
    "omegaconf.dictconfig.DictConfig": "_content",
    "omegaconf.listconfig.ListConfig": "_content",
    "ml_collections.config_dict.config_dict.ConfigDict": "_fields",
    "ml_collections.config_dict.config_dict.FrozenConfigDict": "_fields",
}
"""Classes that are nothing but a plain container → the part of their state that holds it."""
_NODES = "omegaconf.nodes"
"""Module of classes that hold one plain value as `_val`."""


class Settling:
    """Settles the content of one pickle of `size` bytes. `kinds`: classes that became records."""

    def __init__(self, tensors: Tensors, allowance: Allowance, size: int) -> None:
        self._tensors, self._allowance = tensors, allowance
        self._left = _EACH_BYTE * size + _ANY_FILE
        self._done: dict[int, tuple[object, object, int, int]] = {}
        self._open: set[int] = set()
        self.kinds: set[str] = set()

    def settle(self, value: object) -> object:
        """Plain containers, tensors and records; dictionaries and lists are changed in place.

        Raises CheckpointError for what is too deep, or too large when everything held twice is written out twice.
        """
        return self._settled(value, 0)[0]

    def _settled(self, value: object, depth: int) -> tuple[object, int, int]:
        """A value, how many containers deep it is, and how many values it has."""
        if type(value) in _PLAIN or (type(value) in _CONTAINERS and not value):
            return value, 0, 1
        at = id(value)
        if at in self._done:
            return self._done[at][1:]
        if at in self._open:
            return self._within_itself(value), 1, 1
        if depth > _DEEPEST:
            raise CheckpointError(f"refused: its containers are more than {_DEEPEST} deep")
        self._allowance.take(_EACH_CONTAINER)
        self._open.add(at)
        found = result, height, count = self._of_kind(value, depth)
        if depth + height > _DEEPEST:
            raise CheckpointError(f"refused: its containers are more than {_DEEPEST} deep")
        self._pay(0, count)
        self._open.discard(at)
        self._done[at] = (value, *found)  # the value too: as long as it is there, nothing else has its identity
        return result, height, count

    def _pay(self, work: int, count: int = 0) -> None:
        self._left -= work
        if self._left < 0 or count > self._left:
            raise CheckpointError("refused: its pickle unfolds to many times its own size")

    def _record(self, kind: str, fields: dict[str, object]) -> Record:
        self.kinds.add(kind)
        return Record(kind, fields)

    def _within_itself(self, value: object) -> Record:
        """What stands where a container holds one that it is in: its kind, without the fields."""
        return self._record(value.kind.full, {}) if isinstance(value, Instance) else Record(type(value).__name__, {})

    def _of_kind(self, value: object, depth: int) -> tuple[object, int, int]:
        if isinstance(value, dict):
            return self._dict(value, depth)
        if isinstance(value, list):
            return self._list(value, depth)
        if isinstance(value, tuple | set | frozenset):
            members, height, count = self._list(list(value), depth)
            if isinstance(value, tuple):
                return tuple(members), height, count
            return type(value)(map(self._as_key, members)), height, count
        if isinstance(value, Instance):
            return self._instance(value, depth)
        return self._value(value), 0, 1

    def _value(self, value: object) -> object:
        """What holds nothing else that is inert: a storage, an array, a name."""
        if isinstance(value, Symbol):
            return value.full if value.full in DTYPES else self._record(value.full, {})
        if isinstance(value, Storage):
            return self._tensors.whole(value)
        if isinstance(value, Marked):
            self._tensors.take(2 * value.tensor.nbytes)
            return value.resolved()
        if isinstance(value, NumpyType):
            return value.order + value.code
        if isinstance(value, NumpyArray):
            size = numpy_values.elements(value)
            if size is not None:
                self._tensors.take(size)
                return numpy_values.as_tensor(value)
            return self._record(value.kind.full, {"dtype": self._value(value.type)})
        raise CheckpointError(f"refused: a {type(value).__name__} where a value should be")

    def _list(self, values: list[object], depth: int) -> tuple[list[object], int, int]:
        deepest, counted = 0, len(values)
        for at, member in enumerate(values):
            if type(member) not in _PLAIN:
                values[at], height, count = self._settled(member, depth + 1)
                deepest, counted = max(deepest, height), counted + count
        return values, deepest + 1, counted + 1

    def _dict(self, values: dict[object, object], depth: int) -> tuple[dict[object, object], int, int]:
        deepest, counted, moved = 0, 2 * len(values), False
        for key, member in values.items():
            moved = moved or type(key) not in _PLAIN
            if type(member) not in _PLAIN:
                values[key], height, count = self._settled(member, depth + 1)
                deepest, counted = max(deepest, height), counted + count
        if moved:
            pairs = [(self._as_key(self._settled(key, depth + 1)[0]), member) for key, member in values.items()]
            values.clear()
            values.update(pairs)
        return values, deepest + 1, counted + 1

    def _as_key(self, value: object) -> object:
        try:
            hash(value)
        except TypeError:  # what was an object has become a plain list
            return Record(type(value).__name__, {})
        return value

    def _instance(self, instance: Instance, depth: int) -> tuple[object, int, int]:
        """The plain value where the class only holds one, else a record."""
        kind = instance.kind.full
        state = next((state for state in instance.states if isinstance(state, dict)), {})
        if instance.kind.module == _NODES and "_val" in state:
            return self._settled(state["_val"], depth + 1)
        if kind in _INSIDE and isinstance(state.get(_INSIDE[kind]), dict | list):
            return self._settled(state[_INSIDE[kind]], depth + 1)
        fields, height, count = self._settled(self._fields(instance), depth + 1)
        return self._record(kind, fields if isinstance(fields, dict) else {}), height, count

    def _fields(self, instance: Instance) -> dict[str, object]:
        """What an object was saved with, by name: a dict's items and its state; positional arguments by number."""
        parts: list[dict[object, object]] = []
        if instance.arguments:
            parts.append({str(at): argument for at, argument in enumerate(instance.arguments)})
        if instance.items:
            parts.append(instance.items)
        if instance.listed is not None:
            parts.append({"items": instance.listed})
        for state in instance.states:
            both = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            if all(part is None or isinstance(part, dict) for part in both):  # __dict__, and what __slots__ hold
                parts += [_own(part) for part in both if isinstance(part, dict) and part]
            else:
                parts.append({"state": state})
        count = sum(map(len, parts))
        self._pay(count)
        if len(parts) == 1 and all(type(name) is str for name in parts[0]):
            return parts[0]  # type: ignore[return-value]
        self._allowance.take(_EACH_FIELD * count)
        return {_name(key): value for part in parts for key, value in part.items()}


def _own(state: dict[object, object]) -> dict[object, object]:
    """The fields in a state; pydantic's has them under `__dict__`."""
    inner = state.get("__dict__")
    return inner if isinstance(inner, dict) else state


def _name(key: object) -> str:
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int | float) else type(key).__name__
