"""Which components move together, by a study's rule: those of a layer, of a kind, or of a pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence

from search.base.errors import StudyError
from search.problem.groups import Groups
from search.problem.precision_section import PrecisionSection
from search.problem.space import Space
from ssm_mp.components import Component
from ssm_mp.files.shown import listed
from ssm_mp.precision_map import matches


def grouped_by_rule(space: Space, precision: PrecisionSection) -> Space:
    """The space with the groups that a study asks for; those of `auto` need probes, and are made later.

    Raises StudyError for a pattern of no use.
    """
    if precision.groups:
        return space.grouped(by_patterns(space, precision.groups))
    if precision.group == "layer":
        return space.grouped(_by(space, lambda component: f"layer {component.layer}"))
    if precision.group == "kind":
        return space.grouped(_by(space, lambda component: f"kind {component.kind}"))
    return space


def _by(space: Space, group: Callable[[Component], str]) -> Groups:
    """The free components of the layers by the name of their group; what belongs to no layer stays alone."""
    members: dict[str, list[str]] = {}
    for component in space.free:
        if component.layer is not None:
            members.setdefault(group(component), []).append(component.name)
    return {name: tuple(held) for name, held in members.items() if len(held) > 1}


def by_patterns(space: Space, patterns: Sequence[str]) -> Groups:
    """For each pattern the free components that it matches and none before it did; a single one stays itself."""
    require_patterns(patterns, space.components, space.pins)
    names = [component.name for component in space.components]
    free = [component.name for component in space.free]
    taken: dict[str, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        matched = [name for name in names if matches(pattern, name)]
        moving = [name for name in matched if name in free]
        members = tuple(name for name in moving if name not in taken)
        if not members:
            raise StudyError(f"[precision] groups: {pattern!r} {_useless(matched, moving, taken)}")
        taken |= dict.fromkeys(members, pattern)
        if len(members) > 1:
            groups[pattern] = members
    return groups


def require_patterns(patterns: Sequence[str], components: Sequence[Component], pins: Collection[str]) -> None:
    """Raise StudyError for a pattern that matches nothing, or only what is pinned: known before any model runs."""
    names = [component.name for component in components]
    movable = [name for name in names if name not in pins]
    for pattern in patterns:
        matched = [name for name in names if matches(pattern, name)]
        if not matched:
            near = _nearest(pattern, movable)
            raise StudyError(f"[precision] groups: {pattern!r} matches no component; the nearest are {near}")
        if all(name in pins for name in matched):
            raise StudyError(
                f"[precision] groups: {pattern!r} matches only pinned components ({listed(matched, 4)}); lift their "
                f"pin ([precision] pin, unpin), or take one of {_nearest(pattern, movable)}"
            )


def _useless(matched: Sequence[str], moving: Sequence[str], taken: dict[str, str]) -> str:
    """Why a pattern that matches something makes no group, and what to do."""
    if moving:
        return f"matches nothing that {taken[moving[0]]!r} has not taken; put it before that, or leave it out"
    return f"matches only components with a single choice ({listed(matched, 4)}); leave it out"


def _nearest(pattern: str, names: Sequence[str], most: int = 3) -> str:
    """The nearest names of free components, numbers of layers and experts left open."""
    open_names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    found = difflib.get_close_matches(pattern, open_names, n=most, cutoff=0.0)
    return ", ".join(map(repr, found)) or "none: no component of this study is free"


def rule_of(precision: PrecisionSection) -> str:
    """The rule in a word or a few, as the fingerprint holds it; empty where components move alone."""
    if precision.groups:
        return "patterns"
    if precision.group == "auto":
        return f"auto, at most {precision.max_groups}"
    return "" if precision.group == "none" else precision.group


def told(space: Space) -> str:
    """What moves together, in one sentence for people."""
    grouped = [unit for unit in space.units if unit.name in space.groups]
    of = sum(len(unit.members) for unit in grouped)
    some = listed((f"{unit.name!r} ({len(unit.members)})" for unit in grouped), 4)
    return f"{of} of {len(space.free)} free components move in {len(grouped)} groups: {some}"
