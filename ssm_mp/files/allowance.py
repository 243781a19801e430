"""What the reading of one file may take, bounded by the file's size, and keys that make no dictionary slow."""

from __future__ import annotations

from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.inert import DamagedError, Instance, Symbol

_EACH_BYTE, _ANY_FILE = 64, 1 << 25
"""Bytes of memory for each byte of a pickle (a Python object is larger than its opcodes), and for any."""
_LONGEST_KEY, _LARGEST_KEY, _PARTS, _DEEPEST = 4096, 1 << 24, 64, 8
_ODD_KEYS = 1 << 13
"""Keys in a file whose hashes someone could choose: with so many, the slowest dictionary takes a second, not hours."""


class Allowance:
    """Memory that is left for containers and copies; `size`: bytes of pickles that are read."""

    def __init__(self, size: int) -> None:
        self._left = _EACH_BYTE * size + _ANY_FILE
        self._odd_keys = _ODD_KEYS

    def take(self, count: int) -> None:
        """Raises CheckpointError where a small file would fill the memory."""
        self._left -= count
        if self._left < 0:
            raise CheckpointError("refused: its pickle unfolds to many times its own size")

    def key(self, value: object) -> object:
        """A value that may be a key of a dictionary or a member of a set.

        Numbers have hashes that the writer of a file knows, texts have not: large numbers, fractions and tuples of
        numbers are counted. Raises DamagedError for what has no hash, CheckpointError for too many of these.
        """
        kind = type(value)
        if kind is str or kind is bytes:
            if len(value) > _LONGEST_KEY:  # type: ignore[arg-type]  # comparing long texts again and again takes long
                raise CheckpointError(f"refused: a key of {len(value):,} characters")  # type: ignore[arg-type]
        elif kind is int:
            if not -_LARGEST_KEY < value < _LARGEST_KEY:  # type: ignore[operator]
                self._odd_key()
        elif kind is tuple or kind is frozenset:
            self._compound(value, _PARTS, _DEEPEST)
            if not all(type(part) is str for part in value):  # type: ignore[attr-defined]
                self._odd_key()
        elif kind is float or kind is complex:
            self._odd_key()
        elif not (value is None or kind is bool or isinstance(value, Instance | Symbol | Tensor)):
            raise DamagedError(f"a {kind.__name__} as a key")
        return value

    def _odd_key(self) -> None:
        self._odd_keys -= 1
        if self._odd_keys < 0:
            raise CheckpointError(f"refused: more than {_ODD_KEYS:,} keys that are large numbers or tuples")

    def _compound(self, value: object, parts: int, depth: int) -> int:
        """Check a tuple's parts as keys; returns how many more parts the whole key may have."""
        for part in value:  # type: ignore[attr-defined]
            parts -= 1
            if parts < 0 or depth == 0:
                raise CheckpointError("refused: a key of many parts")
            if isinstance(part, tuple | frozenset):
                parts = self._compound(part, parts, depth - 1)
            else:
                self.key(part)
        return parts
