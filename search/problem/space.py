"""The search space: which components are free, and what each of them may become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ssm_mp.components import Component
from ssm_mp.conversion.convert import Converter
from ssm_mp.errors import InfeasibleError
from ssm_mp.files.shown import listed
from ssm_mp.precision_map import PINNED_TO, PrecisionMap


@dataclass(frozen=True, eq=False)
class Space:
    """All components, and for the free ones the precisions that they can take, the widest first.

    `infeasible` tells, for a (component, precision) that was asked for and cannot be held, why.
    """

    components: tuple[Component, ...]
    pins: frozenset[str]
    choices: Mapping[str, tuple[str, ...]]
    infeasible: Mapping[tuple[str, str], str]

    @property
    def free(self) -> tuple[Component, ...]:
        """Components with more than one choice, in the order of the data flow."""
        return tuple(component for component in self.components if len(self.choices[component.name]) > 1)

    @property
    def size(self) -> int:
        """Number of different maps."""
        size = 1
        for component in self.components:
            size *= len(self.choices[component.name])
        return size

    def map(self, chosen: Mapping[str, str]) -> PrecisionMap:
        """A total map: `chosen` where something is said, the widest choice elsewhere."""
        return PrecisionMap(tuple((c.name, chosen.get(c.name, self.choices[c.name][0])) for c in self.components))

    def widest(self) -> PrecisionMap:
        """Every component at its widest choice: all-fp16 where feasible."""
        return self.map({})

    def lowest(self) -> PrecisionMap:
        """Every component at its narrowest choice."""
        return self.map({component.name: self.choices[component.name][-1] for component in self.free})

    def within(self, precision_map: PrecisionMap) -> PrecisionMap:
        """A map with every precision that this space does not allow replaced by the component's widest."""
        return PrecisionMap(
            tuple(
                (name, precision if precision in self.choices[name] else self.choices[name][0])
                for name, precision in precision_map
            )
        )

    def chosen(self, precision_map: PrecisionMap) -> dict[str, str]:
        """The free components' precisions of a map: what a trial's parameters are."""
        held = precision_map.to_json()
        return {component.name: held[component.name] for component in self.free}

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
