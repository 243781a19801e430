"""Expected effects from the probes, how far from additive they are, and the front that they predict.

The increase of a map over FP32 ≈ that of the widest map + one effect for each component and precision. An
effect is the mean of what the probes from both ends say of it, weighted by how surely each says it. The trials
then correct it: see `posterior.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from search.measure.probe import GRADIENT, LOWEST, WIDEST, Probe
from search.problem.space import Space
from search.sampling.catalogue import Catalogue
from search.sampling.programme import Frontier, frontier
from search.sampling.proposal import costs
from ssm_mp.precisions.registry import get_precision

_LEAST_VARIANCE = 1e-16
"""Keeps the weight of a probe finite where all windows agree to the last digit."""
_LEAST_TOTAL = 1e-4
"""Effects are taken to add up to at least this log-increase, where the lowest map happens to cost nothing."""

Effects = Mapping[str, Mapping[str, float]]
"""Component (or group) → precision → log-increase over its widest precision."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """`offset`: log-increase of the widest map over FP32; `effects` over the widest map.

    `gap` is measured minus predicted log-increase of the lowest map: how far from additive the effects are.
    """

    offset: float
    effects: Effects
    gap: float

    def predict(self, chosen: Mapping[str, str]) -> float:
        """Predicted rise of log-perplexity over FP32 of a trial's parameters."""
        return self.offset + sum(self.effects[name][precision] for name, precision in chosen.items())


def additive_front(surrogate: Surrogate, catalogue: Catalogue) -> Frontier:
    """Every map that no other beats by its bytes and the sum of its effects (the offset left out), exactly."""
    flat = [surrogate.effects[catalogue.names[c]][catalogue.precisions[c][k]] for c, k in catalogue.features]
    return frontier(catalogue.sizes, costs(catalogue, np.array(flat)), np.inf)


def smallest_within(surrogate: Surrogate, catalogue: Catalogue, log_increase: float) -> dict[str, str] | None:
    """The smallest map whose predicted increase is at most this much; None where there is none."""
    front = additive_front(surrogate, catalogue)
    within = np.flatnonzero(front.cost <= log_increase - surrogate.offset)
    return catalogue.decode(front.choices[within[0]]) if within.size else None


def best_within(surrogate: Surrogate, catalogue: Catalogue, most_bytes: float) -> dict[str, str] | None:
    """The map of least predicted increase among those of at most so many bytes; None where there is none."""
    front = additive_front(surrogate, catalogue)
    fitting = np.flatnonzero(front.bytes + catalogue.fixed <= most_bytes)
    return catalogue.decode(front.choices[fitting[-1]]) if fitting.size else None


def predicted_front(surrogate: Surrogate, catalogue: Catalogue, count: int, budget: float) -> list[dict[str, str]]:
    """At most `count` different maps: the smallest predicted within the budget (log-increase), then the best at
    sizes spread evenly between the lowest and the widest map."""
    if count <= 0:
        return []
    low, high = (catalogue.fixed + sum(pick(held) for held in catalogue.sizes) for pick in (min, max))
    found = [smallest_within(surrogate, catalogue, budget)]
    found += [best_within(surrogate, catalogue, size) for size in np.linspace(low, high, count + 1)[1:-1]]
    different = {tuple(chosen.items()): chosen for chosen in found if chosen is not None}
    return list(different.values())[:count]


def effects_of_size(space: Space, widest: float, lowest: float) -> Effects:
    """Expected effects where nothing was probed: in proportion to a component's parameters and to the variance of
    rounding to so many bits, 4^−bits, scaled so that they add up to what the lowest map costs over the widest."""
    raw = {
        unit.name: {p: unit.count * (4.0 ** -get_precision(p).bits - 4.0 ** -get_precision(held[0]).bits) for p in held}
        for unit in space.units
        for held in [unit.choices]
    }
    moves = space.moves
    total = sum(held[moves[name][-1]] for name, held in raw.items())
    scale = max(lowest - widest, _LEAST_TOTAL) / total if total > 0 else 0.0
    return {name: {p: scale * value for p, value in held.items()} for name, held in raw.items()}


def additive(space: Space, effects: Effects, widest: float, lowest: float) -> Surrogate:
    """The surrogate of given effects and of both ends' measured log-increases over FP32."""
    moves = space.moves
    predicted = widest + sum(held[moves[name][-1]] for name, held in effects.items())
    return Surrogate(widest, effects, lowest - predicted)


def fit(space: Space, probes: Iterable[Probe], widest: float, lowest: float) -> Surrogate:
    """The surrogate of a set of probes; `widest` and `lowest` are both ends' measured log-increases over FP32."""
    measured = {(probe.component, probe.precision, probe.end): probe for probe in probes}
    effects: Effects = {
        unit.name: {precision: _effect(unit.choices, unit.name, precision, measured) for precision in unit.choices}
        for unit in space.units
    }
    return additive(space, effects, widest, lowest)


def _effect(
    choices: tuple[str, ...], name: str, precision: str, measured: Mapping[tuple[str, str, str], Probe]
) -> float:
    """Log-increase of a component at a precision over its widest: both ends, weighted by their inverse variances."""
    top, bottom = choices[0], choices[-1]
    if precision == top:
        return 0.0
    if (name, precision, GRADIENT) in measured:
        return measured[name, precision, GRADIENT].log_increase
    lowered, to_top = measured[name, precision, WIDEST], measured[name, top, LOWEST]
    from_below, variance_below = -to_top.log_increase, to_top.log_stderr**2
    if precision != bottom:
        raised = measured[name, precision, LOWEST]
        from_below += raised.log_increase
        variance_below += raised.log_stderr**2
    weights = (1 / max(lowered.log_stderr**2, _LEAST_VARIANCE), 1 / max(variance_below, _LEAST_VARIANCE))
    return (weights[0] * lowered.log_increase + weights[1] * from_below) / sum(weights)
