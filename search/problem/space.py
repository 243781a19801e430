"""The search space: which components are free, what each of them may become, and which of them move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from search.problem.groups import Groups, expanded
from ssm_mp.components import Component
from ssm_mp.conversion.convert import Converter
from ssm_mp.errors import InfeasibleError
from ssm_mp.files.shown import listed
from ssm_mp.precision_map import PINNED_TO, PrecisionMap
from ssm_mp.scheme import ActivationScheme


@dataclass(frozen=True)
class Unit:
    """What moves: a free component under its own name, or several that always have the same precision.

    choices: what all members can take, the widest first.
    """

    name: str
    members: tuple[Component, ...]
    choices: tuple[str, ...]

    @property
    def stage(self) -> int:
        """Where in the forward pass the first of its members acts."""
        return min(member.stage for member in self.members)

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(member.count for member in self.members)

    def bytes(self, precision: str, scheme: ActivationScheme) -> int:
        """Stored bytes of all members at a precision."""
        return sum(member.bytes(precision, scheme) for member in self.members)


@dataclass(frozen=True, eq=False)
class Space:
    """All components, and for the free ones the precisions that they can take, the widest first.

    `infeasible` tells, for a (component, precision) that was asked for and cannot be held, why. Of a group, each member
    has the choices that all of them share; `apart` is the same space without groups, None where it is that itself.
    """

    components: tuple[Component, ...]
    pins: frozenset[str]
    choices: Mapping[str, tuple[str, ...]]
    infeasible: Mapping[tuple[str, str], str]
    groups: Groups = field(default_factory=dict)
    apart: Space | None = None

    @property
    def free(self) -> tuple[Component, ...]:
        """Components with more than one choice, in the order of the data flow."""
        return tuple(component for component in self.components if len(self.choices[component.name]) > 1)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What moves, in the order of the data flow: groups where they begin, and free components in no group."""
        group_of = {member: name for name, members in self.groups.items() for member in members}
        members: dict[str, list[Component]] = {}
        for component in self.free:
            members.setdefault(group_of.get(component.name, component.name), []).append(component)
        return tuple(Unit(name, tuple(held), self.choices[held[0].name]) for name, held in members.items())

    @property
    def moves(self) -> dict[str, tuple[str, ...]]:
        """What moves → its choices: what a trial's parameters may be."""
        return {unit.name: unit.choices for unit in self.units}

    @property
    def size(self) -> int:
        """Number of different maps."""
        return prod(len(unit.choices) for unit in self.units)

    def map(self, chosen: Mapping[str, str]) -> PrecisionMap:
        """A total map: `chosen`, of groups or of components, where something is said, the widest choice elsewhere."""
        held = expanded(chosen, self.groups)
        return PrecisionMap(tuple((c.name, held.get(c.name, self.choices[c.name][0])) for c in self.components))

    def widest(self) -> PrecisionMap:
        """Every component at its widest choice: all-fp16 where feasible."""
        return self.map({})

    def lowest(self) -> PrecisionMap:
        """Every component at its narrowest choice."""
        return self.map({unit.name: unit.choices[-1] for unit in self.units})

    def within(self, precision_map: PrecisionMap) -> PrecisionMap:
        """A map with every precision that this space does not allow replaced by the component's widest, and a group
        whose members differ put to the widest of theirs."""
        allowed = {
            name: precision if precision in self.choices[name] else self.choices[name][0]
            for name, precision in precision_map
        }
        chosen = {
            unit.name: min((allowed[m.name] for m in unit.members), key=unit.choices.index) for unit in self.units
        }
        return self.map({**allowed, **expanded(chosen, self.groups)})

    def chosen(self, precision_map: PrecisionMap) -> dict[str, str]:
        """The precisions of what moves: what a trial's parameters are. Raises ValueError where a group's members
        differ."""
        held = precision_map.to_json()
        found = {unit.name: held[unit.members[0].name] for unit in self.units}
        for unit in self.units:
            if any(held[member.name] != found[unit.name] for member in unit.members):
                raise ValueError(f"the members of {unit.name!r} have different precisions: no map of this space")
        return found

    def grouped(self, groups: Groups) -> Space:
        """This space with components that move together. Raises InfeasibleError where members share no precision."""
        if not groups:
            return self
        choices = dict(self.choices)
        for name, members in groups.items():
            shared = tuple(p for p in self.choices[members[0]] if all(p in self.choices[member] for member in members))
            if not shared:
                raise InfeasibleError(
                    f"the members of {name!r} ({listed(members, 4)}) share no precision that all of them can take; "
                    "leave one of them out of the group"
                )
            choices |= dict.fromkeys(members, shared)
        return replace(self, choices=choices, groups=groups, apart=self)

    def narrowed(self) -> list[str]:
        """What members of groups lose by it, in words: a line for each group and precision."""
        own = self.choices if self.apart is None else self.apart.choices
        lines = []
        for name, members in self.groups.items():
            shared = self.choices[members[0]]
            for precision in dict.fromkeys(p for member in members for p in own[member] if p not in shared):
                unable = [member for member in members if precision not in own[member]]
                lines.append(f"{name!r} is never {precision}, which {listed(unable, 4)} cannot be")
            if len(shared) == 1:
                lines[-1] += (
                    f"; so it stays at {shared[0]}: leave them out of the group (with [precision] groups, a pattern of "
                    "theirs before it; or pin them)"
                )
        return lines

    def never(self) -> list[str]:
        """What was asked for and cannot be, in words: a line for each reason."""
        alike: dict[tuple[str, str], list[str]] = {}
        for (name, precision), reason in self.infeasible.items():
            alike.setdefault((precision, reason), []).append(name)
        return [f"{listed(names, 4)} is never {precision}: {reason}" for (precision, reason), names in alike.items()]

    def to_json(self) -> dict[str, Any]:
        """Component → choices, for the fingerprint."""
        return {name: list(choices) for name, choices in self.choices.items()}


LeftOut = Callable[[Component, tuple[str, ...]], Mapping[str, str]]
"""Of the precisions that a component may be asked at, those that it may not take, and why."""


def make_space(
    converter: Converter, asked: tuple[str, ...], pins: frozenset[str], left_out: LeftOut = lambda *_: {}
) -> Space:
    """The space of one model: each free component's feasible precisions among those asked for.

    left_out: what a target cannot hold of them. Raises InfeasibleError where a component can be held at none of them.
    """
    choices: dict[str, tuple[str, ...]] = {}
    infeasible: dict[tuple[str, str], str] = {}
    for component in converter.components:
        wanted = (PINNED_TO,) if component.name in pins else asked
        barred = left_out(component, wanted)
        reasons = {p: barred[p] if p in barred else converter.infeasible(component, p) for p in wanted}
        infeasible |= {(component.name, p): reason for p, reason in reasons.items() if reason is not None}
        choices[component.name] = tuple(precision for precision, reason in reasons.items() if reason is None)
        if not choices[component.name]:
            raise InfeasibleError(
                f"{component.name} fits none of its precisions: {'; '.join(filter(None, reasons.values()))}"
            )
    return Space(converter.components, pins, choices, infeasible)
