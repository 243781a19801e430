"""Components that move together, as names: what a trial's parameters stand for. Needs no torch.

A study without groups has none of this in its fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

Groups = Mapping[str, Sequence[str]]
"""Group → its members, at least two components."""

NO_GROUPS: Groups = MappingProxyType({})

GROUPS = "groups"
"""Part of a fingerprint: which components move together, and by which rule."""


def recorded(rule: str, groups: Groups | None) -> dict[str, Any]:
    """Groups as a fingerprint holds them; None where they are still to be made."""
    members = None if groups is None else {name: list(held) for name, held in groups.items()}
    return {"rule": rule, "members": members}


def groups_in(fingerprint: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The groups of a study by its fingerprint; nothing where it has none."""
    members = fingerprint.get(GROUPS, {}).get("members") or {}
    return {name: tuple(held) for name, held in members.items()}


def expanded(params: Mapping[str, str], groups: Groups) -> dict[str, str]:
    """A trial's parameters as the precisions of components.

    >>> expanded({"embedding": "int8", "layer 0": "nf4"}, {"layer 0": ["a", "b"]})
    {'embedding': 'int8', 'a': 'nf4', 'b': 'nf4'}
    """
    return {member: precision for name, precision in params.items() for member in groups.get(name, (name,))}


def moving(choices: Mapping[str, Sequence[str]], groups: Groups) -> dict[str, list[str]]:
    """The choices of whatever moves: of a group those of its first member, of other components their own.

    >>> moving({"e": ["fp16", "int8"], "a": ["fp16", "nf4"], "b": ["fp16", "nf4"]}, {"layer 0": ["a", "b"]})
    {'e': ['fp16', 'int8'], 'layer 0': ['fp16', 'nf4']}
    """
    group_of = {member: name for name, members in groups.items() for member in members}
    return {group_of.get(name, name): list(held) for name, held in choices.items()}
