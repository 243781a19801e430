"""An additive model of log-perplexity increase, and the best maps that it predicts.

The increase of a map over FP32 ≈ that of the widest map + one effect for each component and precision. An
effect is the mean of what the probes from both ends say of it, weighted by how surely each says it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.probe import LOWEST, WIDEST, Probe
from search.space import Space
from ssm_mp.layers import ActivationScheme
from ssm_mp.precision_map import PrecisionMap

_LEAST_VARIANCE = 1e-16
"""Keeps the weight of a probe finite where all windows agree to the last digit."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """`offset`: log-increase of the widest map over FP32; `effects`: component → precision → log-increase, widest 0.

    `gap` is measured minus predicted log-increase of the lowest map: how far from additive the effects are.
    """

    space: Space
    scheme: ActivationScheme
    offset: float
    effects: Mapping[str, Mapping[str, float]]
    gap: float

    def predict(self, precision_map: PrecisionMap) -> float:
        """Predicted rise of log-perplexity over FP32."""
        return self.offset + sum(
            self.effects[name][precision] for name, precision in self.space.chosen(precision_map).items()
        )

    def bytes(self, precision_map: PrecisionMap) -> int:
        """Stored bytes of a map."""
        return precision_map.bytes(self.space.components, self.scheme)

    def best_within(self, most_bytes: int) -> PrecisionMap | None:
        """The map of least predicted increase among those of at most so many bytes; None where there is none."""
        programme = _Programme(self)
        return programme.solve(programme.effects, programme.at_most(programme.sizes, most_bytes - programme.fixed))

    def smallest_within(self, log_increase: float) -> PrecisionMap | None:
        """The smallest map whose predicted increase is at most this much (to the solver's tolerance, a millionth of
        the largest effect); None where there is none."""
        programme = _Programme(self)
        return programme.solve(programme.sizes, programme.at_most(programme.effects, log_increase - self.offset))

    def front(self, count: int, budget: float) -> list[PrecisionMap]:
        """At most `count` different maps, the smallest predicted within the budget (log-increase) first, then the
        best at sizes spread evenly between the lowest and the widest map."""
        if count <= 0:
            return []
        low, high = self.bytes(self.space.lowest()), self.bytes(self.space.widest())
        found = [self.smallest_within(budget)]
        found += [self.best_within(int(size)) for size in np.linspace(low, high, count + 1)[1:-1]]
        return list(dict.fromkeys(candidate for candidate in found if candidate is not None))[:count]


class _Programme:
    """The integer programme over one-hot choices: variables are (free component, precision) pairs."""

    def __init__(self, surrogate: Surrogate) -> None:
        self._space = surrogate.space
        free = surrogate.space.free
        self._pairs = [(c, precision) for c in free for precision in surrogate.space.choices[c.name]]
        self.sizes = np.array([c.bytes(p, surrogate.scheme) for c, p in self._pairs], dtype=float)
        self.effects = np.array([surrogate.effects[c.name][p] for c, p in self._pairs])
        self.fixed = surrogate.bytes(surrogate.space.widest()) - sum(
            c.bytes(surrogate.space.choices[c.name][0], surrogate.scheme) for c in free
        )
        rows = [list(free).index(c) for c, _ in self._pairs]
        self._one_each = csr_array((np.ones(len(rows)), (rows, range(len(rows)))), shape=(len(free), len(self._pairs)))

    def at_most(self, weights: np.ndarray, limit: float) -> LinearConstraint:
        """The sum of the chosen pairs' weights is at most `limit`; scaled, since the tolerances are absolute."""
        scale = (np.abs(weights).max() if weights.size else 0.0) or 1.0
        return LinearConstraint(csr_array(weights[None, :] / scale), ub=limit / scale)

    def solve(self, cost: np.ndarray, limit: LinearConstraint) -> PrecisionMap | None:
        """The map of least cost under a limit, each component at exactly one precision."""
        if not self._pairs:
            return self._space.widest()
        scale = np.abs(cost).max() or 1.0  # effects are tiny; the solver's tolerances are absolute
        with _standard_output_to_error():
            result = milp(
                cost / scale,
                constraints=[LinearConstraint(self._one_each, 1, 1), limit],
                integrality=np.ones(len(self._pairs)),
                bounds=Bounds(0, 1),
            )
        if result.x is None:
            return None
        chosen = {c.name: precision for (c, precision), x in zip(self._pairs, result.x, strict=True) if x > 0.5}
        return self._space.map(chosen)


@contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """The solver prints remarks on the process's standard output, which belongs to the command's answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def fit(space: Space, scheme: ActivationScheme, probes: Iterable[Probe], widest: float, lowest: float) -> Surrogate:
    """The surrogate of a set of probes; `widest` and `lowest` are both ends' measured log-increases over FP32."""
    measured = {(probe.component, probe.precision, probe.end): probe for probe in probes}
    effects = {
        component.name: {
            precision: _effect(space.choices[component.name], component.name, precision, measured)
            for precision in space.choices[component.name]
        }
        for component in space.free
    }
    predicted = widest + sum(held[space.choices[name][-1]] for name, held in effects.items())
    return Surrogate(space, scheme, widest, effects, lowest - predicted)


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
