"""The content of a file as a tree of named tensors, however its containers hold each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record

INNER = frozenset(
    (
        *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
        *("_modules", "_parameters", "_buffers"),
    )
)
"""Parts of names that torch.compile, FSDP, activation checkpointing and a pickled module put anywhere."""

_TENSOR_KINDS = ("torch._utils._rebuild_", "torchao.", "bitsandbytes.", "optimum.quanto.", "hqq.")
"""How the classes and functions begin that make tensors of other kinds than plain ones."""
_DEEPEST, _MOST_VISITS, _MOST_SIGNS = 32, 8, 1 << 26
"""Dictionaries within dictionaries, paths to the same one, and characters of all names together that are looked at."""


@dataclass(frozen=True)
class Leaf:
    """A tensor, a list that holds tensors, or a record in a tensor's place, with the keys that lead to it.

    name: the keys, dotted, without what wraps modules inside of names. original: the same with it.
    """

    keys: tuple[str, ...]
    value: object
    name: str

    @property
    def original(self) -> str:
        return ".".join(self.keys)


def members(value: object) -> Mapping[Any, object] | None:
    """What a dictionary or an object of an unknown class holds by name; None for anything else."""
    if isinstance(value, Record):
        return value.fields
    return value if isinstance(value, Mapping) else None


def leaves(content: object) -> Iterator[Leaf]:
    """Every tensor that names lead to, in the file's order; work is bounded however containers share each other."""
    holding = _holding(content)
    signs = 0
    visits: Counter[int] = Counter()
    stack: list[tuple[tuple[str, ...], object, tuple[int, ...]]] = [((), content, ())]
    while stack:
        keys, value, above = stack.pop()
        signs += 1 + sum(map(len, keys))
        if signs > _MOST_SIGNS:
            raise CheckpointError("its names are too long to be those of a model")
        inside = members(value)
        if isinstance(value, Tensor) or inside is None or is_stand_in(value):
            name = ".".join(part for part in ".".join(keys).split(".") if part not in INNER)
            yield Leaf(keys, value, name)
        elif id(value) not in above and len(keys) < _DEEPEST and visits[id(value)] < _MOST_VISITS:
            visits[id(value)] += 1
            stack += [
                ((*keys, text), child, (*above, id(value)))
                for key, child in reversed(list(inside.items()))
                if (text := key_name(key)) is not None and _leads_on(child, holding)
            ]


def is_stand_in(value: object) -> bool:
    """Whether a record stands for a tensor that is no plain one: quantised, sparse, or without values."""
    return isinstance(value, Record) and value.kind.startswith(_TENSOR_KINDS)


def _leads_on(value: object, holding: set[int]) -> bool:
    return isinstance(value, Tensor) or id(value) in holding or is_stand_in(value)


def key_name(key: object) -> str | None:
    """A key as part of a name; None for what is neither a text nor a plain number."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and key.bit_length() <= 64 else None


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values; those without values equal nothing."""
    return one.dtype == other.dtype and "meta" not in (one.device.type, other.device.type) and torch.equal(one, other)


def _holding(content: object) -> set[int]:
    """Identities of the containers in which there are tensors, at any depth."""
    above: dict[int, list[int]] = {}
    found: list[int] = []
    queue, seen = [content], {id(content)}
    while queue:
        container = queue.pop()
        for child in _children(container):
            if isinstance(child, Tensor):
                found.append(id(container))
            elif isinstance(child, Mapping | Record | list | tuple):
                above.setdefault(id(child), []).append(id(container))
                if id(child) not in seen:
                    seen.add(id(child))
                    queue.append(child)
    holding: set[int] = set()
    while found:
        one = found.pop()
        if one not in holding:
            holding.add(one)
            found += above.get(one, ())
    return holding


def _children(container: object) -> Iterable[object]:
    if isinstance(container, list | tuple):
        return container
    inside = members(container)
    return () if inside is None else inside.values()
