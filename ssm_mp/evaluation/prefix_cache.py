"""Hidden states that candidates share: what comes before the first component in which two maps differ.

Dimensions: `b` windows of one shard, `L` window length, `d` model.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

Key = tuple[Hashable, bytes]


@dataclass(frozen=True)
class Reuse:
    """How often a cache helped: layers that were looked for, and those that were found computed."""

    layers: int
    reused: int


class PrefixCache:
    """Hidden states by what they depend on, the least recently used let go where they take more than `capacity` bytes.

    Any number of threads may use one.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps nothing."""
        self._capacity = capacity
        self._held: OrderedDict[Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._layers = self._reused = 0

    @property
    def capacity(self) -> int:
        """Bytes that it may hold."""
        return self._capacity

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self._bytes

    @property
    def reuse(self) -> Reuse:
        """How often it helped so far."""
        return Reuse(self._layers, self._reused)

    def deepest(self, keys: Sequence[Key]) -> tuple[int, Tensor] | None:
        """The last of `keys`, which stand for ever deeper layers, that is held: its place, and the hidden states."""
        with self._lock:
            self._layers += len(keys)
            found = [place for place, key in enumerate(keys) if key in self._held]
            # the shallow ones become the youngest: more candidates share them
            for place in reversed(found):
                self._held.move_to_end(keys[place])
            if not found:
                return None
            self._reused += found[-1] + 1
            return found[-1], self._held[keys[found[-1]]]

    def keep(self, states: Sequence[tuple[Key, Tensor]]) -> None:
        """Hold states, the deepest last; where there is no room for all, the shallow ones stay."""
        with self._lock:
            for key, hidden in reversed(states):
                size = hidden.numel() * hidden.element_size()
                if key in self._held or size > self._capacity:
                    continue
                self._held[key] = hidden
                self._bytes += size
            while self._bytes > self._capacity:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= oldest.numel() * oldest.element_size()


@dataclass(frozen=True, eq=False)
class Prefixes:
    """One model's part in a cache.

    before: for each layer from the second on (the first one's input is only looked up), all that its input depends on
    besides the windows: what the model holds in the components before it.
    """

    cache: PrefixCache
    before: Sequence[Hashable]

    def keys(self, ids: Tensor) -> list[Key]:
        """The cache's keys of these windows `[b, L]`, one for each place of `before`."""
        windows = hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=16).digest()
        return [(depends, windows) for depends in self.before]
