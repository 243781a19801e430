"""Expected effects from the probes, how far from additive they are, and the front that they predict.

The increase of a map over FP32 ≈ that of the widest map + one effect for each component and precision. An
effect is the mean of what the probes from both ends say of it, weighted by how surely each says it. The trials
then correct it: see `posterior.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from search.catalogue import Catalogue
from search.probe import LOWEST, WIDEST, Probe
from search.programme import frontier
from search.proposal import costs
from search.space import Space

_LEAST_VARIANCE = 1e-16
"""Keeps the weight of a probe finite where all windows agree to the last digit."""

Effects = Mapping[str, Mapping[str, float]]
"""Component → precision → log-increase over its widest precision."""


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


def predicted_front(surrogate: Surrogate, catalogue: Catalogue, count: int, budget: float) -> list[dict[str, str]]:
    """At most `count` different maps: the smallest predicted within the budget (log-increase), then the best at
    sizes spread evenly between the lowest and the widest map."""
    flat = [surrogate.effects[catalogue.names[c]][catalogue.precisions[c][k]] for c, k in catalogue.features]
    front = frontier(catalogue.sizes, costs(catalogue, np.array(flat)), np.inf)
    if count <= 0:
        return []
    low, high = (sum(pick(held) for held in catalogue.sizes) for pick in (min, max))
    within = np.flatnonzero(front.cost <= budget - surrogate.offset)
    rows = list(within[:1])
    for size in np.linspace(low, high, count + 1)[1:-1]:
        rows.append(np.flatnonzero(front.bytes <= max(size, front.bytes[0]))[-1])
    return [catalogue.decode(front.choices[row]) for row in dict.fromkeys(map(int, rows))][:count]


def fit(space: Space, probes: Iterable[Probe], widest: float, lowest: float) -> Surrogate:
    """The surrogate of a set of probes; `widest` and `lowest` are both ends' measured log-increases over FP32."""
    measured = {(probe.component, probe.precision, probe.end): probe for probe in probes}
    effects = {
        component.name: {
            precision: _effect(space.choices[component.name], component.name, precision, measured)
            for precision in space.choices[component.name]
        }
        for component in space.free
    }
    return surrogate_of(space, effects, widest, lowest)


def surrogate_of(space: Space, effects: Effects, widest: float, lowest: float) -> Surrogate:
    """The surrogate of expected effects over FP32 or over the widest map, and of both ends' measured log-increases."""
    over_widest = {
        name: {precision: effect - held[space.choices[name][0]] for precision, effect in held.items()}
        for name, held in effects.items()
    }
    predicted = widest + sum(held[space.choices[name][-1]] for name, held in over_widest.items())
    return Surrogate(widest, over_widest, lowest - predicted)


def _effect(
    choices: tuple[str, ...], name: str, precision: str, measured: Mapping[tuple[str, str, str], Probe]
) -> float:
    """Log-increase of a component at a precision over its widest: both ends, weighted by their inverse variances."""
    top, bottom = choices[0], choices[-1]
    if precision == top:
        return 0.0
    lowered, to_top = measured[name, precision, WIDEST], measured[name, top, LOWEST]
    from_below, variance_below = -to_top.log_increase, to_top.log_stderr**2
    if precision != bottom:
        raised = measured[name, precision, LOWEST]
        from_below += raised.log_increase
        variance_below += raised.log_stderr**2
    weights = (1 / max(lowered.log_stderr**2, _LEAST_VARIANCE), 1 / max(variance_below, _LEAST_VARIANCE))
    return (weights[0] * lowered.log_increase + weights[1] * from_below) / sum(weights)
