"""Which map to evaluate next: the one with the largest expected growth of the front.

Dimensions: `n` free components, `f` features, `m` maps, `t` evaluated maps.

Candidates are the exact fronts, by dynamic programming, of one draw from the posterior (so that workers who ask at
the same time look at different maps) and of its mean; the best of them is then improved component by component
under the whole posterior, pair terms included. Latency, like bytes, is known of every map and additive: where it is an
objective, there are fronts over bytes, over latency and over a random blend of both, and the gain is that of a volume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from search.sampling.catalogue import Catalogue, Choices
from search.sampling.gain import expected_gain, expected_volume_gain, staircase, terrain
from search.sampling.posterior import Posterior
from search.sampling.programme import MOST_STATES, frontier

_WINNER_EVERY = 4
"""Every so many proposals look for a smaller map within the budget instead: the area hardly rewards the last bytes."""
_LEAST_CHANCE = 0.02
"""A smaller map is worth a proposal for the winner only with this chance of being within the budget."""
_MOST_CANDIDATES, _MOST_CANDIDATES_OF_THREE = 256, 96
"""Of each front; with latency there are three times as many fronts."""
_ROUNDS, _ROUNDS_OF_MANY = 4, 1
_MANY = 200
"""Features from which on a proposal is improved in fewer rounds, and fronts are thinned sooner, to stay quick."""
_MOST_STATES_OF_MANY = 512


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Maps with all windows: choices `[t, n]`, increase in percent `[t]`."""

    choices: Choices
    increase_percent: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Maps that could be next, with what is expected of them: `[m, n]`, bytes `[m]`, percent `[m]` twice."""

    choices: Choices
    bytes: np.ndarray
    mean: np.ndarray
    stddev: np.ndarray


def propose(
    catalogue: Catalogue,
    posterior: Posterior,
    evaluated: Evaluated,
    taken: Sequence[np.ndarray],
    budget_percent: float,
    rng: np.random.Generator,
    excluded: Sequence[np.ndarray] = (),
    certifiable_percent: float | None = None,
) -> np.ndarray | None:
    """Choices `[n]` of the next map; None where every map is evaluated, taken or excluded.

    taken: maps that are queued or being evaluated; they count as if they came out as predicted. excluded: maps that
    were stopped early, known to be off the front. certifiable_percent: the increase up to which maps are likely to be
    certified: every other proposal for the winner looks for a smaller map within that, since none of those between it
    and the budget will win.
    """
    seen = {row.tobytes() for row in [*evaluated.choices, *taken, *excluded]}
    if len(seen) >= catalogue.maps:
        return None
    gain = _gain(catalogue, posterior, evaluated, taken, budget_percent)
    found = _unseen(_fronts(catalogue, posterior, budget_percent, rng), seen)
    while not len(found):  # everything on the predicted fronts is known: look elsewhere
        found = _unseen(_neighbours(catalogue, random_map(catalogue, rng)), seen)
    for_winner, rest = divmod(len(seen), _WINNER_EVERY)
    if rest == 0:  # with latency in turn for the fastest
        axes = [catalogue] if catalogue.latencies is None else [catalogue, catalogue.by_latency]
        turn, at = divmod(for_winner, len(axes))
        axis = axes[at]
        within = budget_percent if certifiable_percent is None or turn % 2 == 0 else certifiable_percent
        smallest = _smallest(axis, evaluated, within)
        smaller = None if smallest is None else _winner(axis, posterior, found, seen, smallest, within)
        if smaller is not None:
            return smaller
    return _improved(catalogue, posterior, found, seen, gain)


Gain = Callable[[Candidates], np.ndarray]
"""What the front is expected to grow by, for each candidate on its own, `[m]`."""


def _gain(
    catalogue: Catalogue, posterior: Posterior, evaluated: Evaluated, taken: Sequence[np.ndarray], budget: float
) -> Gain:
    """The gain over the front so far, with what is on its way."""
    choices, increase = evaluated.choices, evaluated.increase_percent
    if len(taken):
        expected = predicted(catalogue, posterior, np.stack(taken))
        choices = np.concatenate([choices, expected.choices])
        increase = np.concatenate([increase, expected.mean])
    compression = catalogue.fp32_bytes / catalogue.bytes(choices)
    if catalogue.latencies is None:
        stairs = staircase(compression, increase, budget)
        return lambda new: expected_gain(stairs, catalogue.fp32_bytes / new.bytes, new.mean, new.stddev)
    ground = terrain(compression, _saved(catalogue, choices), increase, budget)
    return lambda new: expected_volume_gain(
        ground, catalogue.fp32_bytes / new.bytes, _saved(catalogue, new.choices), new.mean, new.stddev
    )


def _saved(catalogue: Catalogue, choices: Choices) -> np.ndarray:
    """Latency that maps save, as a fraction of the hypervolume's corner, `[m]`."""
    return np.asarray(1 - catalogue.by_latency.bytes(choices) / catalogue.latency_reference)


def predicted(catalogue: Catalogue, posterior: Posterior, choices: Choices) -> Candidates:
    """Maps with the mean and standard deviation of their increase in percent."""
    mean, stddev = posterior.predict(catalogue.one_hot(choices))
    percent = 100 * np.expm1(np.minimum(mean, 5.0))
    return Candidates(choices, catalogue.bytes(choices), percent, (100 + percent) * stddev)


def _fronts(catalogue: Catalogue, posterior: Posterior, budget: float, rng: np.random.Generator) -> Choices:
    """The fronts of the posterior's mean and of one draw, up to a little above the budget, over every axis."""
    limit = math.log1p(1.3 * budget / 100)
    most = MOST_STATES if len(catalogue.features) < _MANY else _MOST_STATES_OF_MANY
    found = []
    drawn = (posterior.effects(), posterior.draw(rng))
    axes, count = [catalogue], _MOST_CANDIDATES
    if catalogue.latencies is not None:
        axes += [catalogue.by_latency, catalogue.blended(rng.random())]
        count = _MOST_CANDIDATES_OF_THREE
    for axis, (offset, effects) in itertools.product(axes, drawn):
        front = frontier(axis.sizes, costs(catalogue, effects), limit - offset, most)
        if len(front.bytes):
            found.append(front.choices[np.unique(np.linspace(0, len(front.bytes) - 1, count).astype(int))])
    return np.concatenate([np.zeros((0, len(catalogue.names)), dtype=np.int64), *found])


def costs(catalogue: Catalogue, effects: np.ndarray) -> list[list[float]]:
    """Effects `[f]` as one list a component, 0 for its widest choice."""
    held = [[0.0] * len(precisions) for precisions in catalogue.precisions]
    for (c, k), effect in zip(catalogue.features, effects, strict=True):
        held[c][k] = float(effect)
    return held


def _unseen(choices: Choices, seen: set[bytes]) -> Choices:
    """The different maps among `choices` that are new."""
    keep, known = [], set(seen)
    for i, row in enumerate(choices):
        key = row.tobytes()
        if key not in known:
            known.add(key)
            keep.append(i)
    return choices[keep]


def _neighbours(catalogue: Catalogue, row: np.ndarray) -> Choices:
    """All maps that differ from one in a single component."""
    found = []
    for c, held in enumerate(catalogue.precisions):
        for k in range(len(held)):
            if k != row[c]:
                other = row.copy()
                other[c] = k
                found.append(other)
    return np.array(found, dtype=np.int64).reshape(len(found), len(catalogue.names))


def random_map(catalogue: Catalogue, rng: np.random.Generator) -> np.ndarray:
    """A map at random, `[n]`."""
    return np.array([rng.integers(len(held)) for held in catalogue.precisions], dtype=np.int64)


def _improved(catalogue: Catalogue, posterior: Posterior, found: Choices, seen: set[bytes], gain: Gain) -> np.ndarray:
    """The candidate of the largest expected gain, changed one component at a time while that grows."""
    gains = gain(predicted(catalogue, posterior, found))
    best, most = found[gains.argmax()], gains.max()
    for _ in range(_ROUNDS if len(catalogue.features) < _MANY else _ROUNDS_OF_MANY):
        around = _unseen(_neighbours(catalogue, best), seen)
        if not len(around):
            break
        gains = gain(predicted(catalogue, posterior, around))
        if gains.max() <= most:
            break
        best, most = around[gains.argmax()], gains.max()
    return np.array(best)


def _smallest(catalogue: Catalogue, evaluated: Evaluated, budget: float) -> int | None:
    """Bytes of the smallest evaluated map within the budget."""
    within = evaluated.increase_percent <= budget
    return int(catalogue.bytes(evaluated.choices[within]).min()) if within.any() else None


def _winner(
    catalogue: Catalogue, posterior: Posterior, found: Choices, seen: set[bytes], smallest: int, budget: float
) -> np.ndarray | None:
    """The map of the largest expected saving over the smallest one within the budget; None where hopeless."""

    def savings(choices: Choices) -> np.ndarray:
        expected = predicted(catalogue, posterior, choices)
        chance = ndtr((budget - expected.mean) / expected.stddev)
        return np.where(chance >= _LEAST_CHANCE, np.maximum(smallest - expected.bytes, 0) * chance, 0.0)

    saved = savings(found)
    best, most = found[saved.argmax()], saved.max()
    for _ in range(_ROUNDS if len(catalogue.features) < _MANY else _ROUNDS_OF_MANY):
        around = _unseen(_neighbours(catalogue, best), seen)
        if not len(around):
            break
        saved = savings(around)
        if saved.max() <= most:
            break
        best, most = around[saved.argmax()], saved.max()
    return np.array(best) if most > 0 else None
