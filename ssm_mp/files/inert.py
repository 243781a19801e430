"""What a pickle's names and objects become while it is read: inert, whatever they are called."""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, in which protocols 0 to 2 write
from dataclasses import dataclass, field

_PUBLIC = {"posix": "os", "nt": "os", "_operator": "operator"}
"""Modules that pickles name → where people know what is in them from."""


class DamagedError(Exception):
    """Data that is no whole pickle or torch file; the message is the reason."""


@dataclass(frozen=True, eq=False, slots=True)
class Symbol:
    """A name of something importable, which is never imported: a class, a function or a value."""

    module: str
    name: str

    @classmethod
    def named(cls, module: str, name: str, protocol: int) -> Symbol:
        if protocol < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return cls(_PUBLIC.get(module, module), name)

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def of_python(self) -> bool:
        """Whether it is of the standard library, of which only what is known to be harmless is made."""
        return self.module.split(".")[0] in sys.stdlib_module_names

    @property
    def like_a_class(self) -> bool:
        return self.name.split(".")[-1].lstrip("_")[:1].isupper()


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class that is not imported, with whatever the pickle gives it.

    arguments: of its construction. items, listed: where the class is a dict or a list. states: what `__setstate__`
    would get; held as they are, never copied.
    """

    kind: Symbol
    arguments: tuple[object, ...] = ()
    items: dict[object, object] | None = None
    listed: list[object] | None = None
    states: list[object] = field(default_factory=list)
