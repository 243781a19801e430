"""Synthetic searches: a known truth, noisy windows, and the maps that a search would try.

Window noise is a gamma process: a component that costs more adds more variance and less relative skewness, and two
maps share the noise of the components that they share. On the reference checkpoint below 8 bits, maps of +3 % to
+8 % have differences of standard deviation 0.033–0.052 nats a token from window to window, skewness 0.5–0.8 and
kurtosis 3.9–6.0; the variance grows as the increase does (`python -m benchmarks.resampling`, 2000 windows).

Dimensions: `c` components, `p` precisions, `w` windows, `m` maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BITS = (16.0, 8.0, 4.25, 3.25)
_COSTS = (0.0, 1 / 256, 1.0, 4.0)
"""Bits a value of fp16, int8, int4, int3 with their scales, and cost beside int4: a factor of 4 for each bit."""

_COMPONENTS = 12


@dataclass(frozen=True)
class Noise:
    """Paired differences, window to window, of a map whose true increase is the budget.

    sd: standard deviation, nats a token. skewness: of the gamma part. tails: windows differ in the size of their
    noise by a lognormal factor of this log-standard deviation t; kurtosis is (3 + 1.5 skewness²) · exp(4 t²).
    documents: how many documents, of sizes that are lognormal, each split of windows comes from, None where windows
    are independent; alike: the correlation of two windows of one document.
    """

    sd: float = 0.04
    skewness: float = 0.6
    tails: float = 0.3
    documents: int | None = None
    alike: float = 0.0


@dataclass(frozen=True, eq=False)
class World:
    """The truth: `sizes [c, p]` in bytes, `effects [c, p]` in nats a token; both add up over components.

    The first precision is the widest and has no effect; effects do not fall from one precision to the next.
    `budget` is in nats a token.
    """

    sizes: Floats
    effects: Floats
    budget: float

    def bytes(self, maps: Ints) -> Ints:
        """Sizes `[m]` of `maps [m, c]`, which hold indices of precisions."""
        return total(self.sizes, maps).round().astype(np.int64)

    def increases(self, maps: Ints) -> Floats:
        """True rises of log-perplexity `[m]`."""
        return total(self.effects, maps)


def total(table: Floats, maps: Ints) -> Floats:
    """Sums over components of `table [c, p]` at `maps [m, c]`: `[m]`."""
    found: Floats = table[np.arange(table.shape[0]), maps].sum(axis=1)
    return found


def model_world(budget: float, rng: np.random.Generator) -> World:
    """A model of 12 components of one million values at four precisions; all-int4 costs 0.5 to 2 budgets."""
    parameters = rng.lognormal(0, 1, size=_COMPONENTS)
    sizes = 1e6 * (parameters / parameters.sum())[:, None] * np.array(_BITS) / 8
    costs = rng.lognormal(0, 1, size=_COMPONENTS)
    all_int4 = budget * rng.uniform(0.5, 2)
    return World(sizes, all_int4 * (costs / costs.sum())[:, None] * np.array(_COSTS), budget)


def edge_world(budget: float, margin: tuple[float, float], count: int, rng: np.random.Generator) -> World:
    """Maps that share nothing, each with a true increase near the budget, off it by `margin` (relative).

    There are as many components as maps, map number i lowers component i alone, and the table holds its whole size.
    """
    sizes = 1e6 + rng.choice(1_000_000, size=count, replace=False)
    effects = budget * (1 + rng.uniform(*margin, size=count))
    zeros = np.zeros(count)
    return World(np.stack([zeros, sizes], axis=1), np.stack([zeros, effects], axis=1), budget)


class Windows:
    """Paired differences on a split of `count` windows; a component's noise is drawn when it is first needed.

    A map at the budget adds up to a gamma variable of shape 4 ÷ skewness², centred and scaled to `sd`.
    """

    def __init__(self, world: World, noise: Noise, count: int, rng: np.random.Generator) -> None:
        self._effects, self._rng = world.effects, rng
        shape = 4 / noise.skewness**2
        self._steps = shape * np.diff(world.effects, axis=1, prepend=0.0) / world.budget
        spread = np.exp(noise.tails * rng.standard_normal(count) - noise.tails**2)
        self._scale = spread * noise.sd / math.sqrt(shape)
        self._drawn: dict[int, Floats] = {}
        self._alike = noise.alike
        self.sources: Ints | None = None
        if noise.documents is not None:
            sizes = rng.lognormal(size=noise.documents)
            self.sources = rng.choice(noise.documents, size=count, p=sizes / sizes.sum())

    def means(self) -> Floats:
        """Measured effects `[c, p]` of all components, on draws of their own: ask for them or for single maps."""
        noise = self._noise(self._steps)
        measured: Floats = self._effects + np.tensordot(self._scale, noise, axes=1).cumsum(axis=1) / self._scale.size
        return measured

    def differences(self, chosen: Ints, count: int) -> Floats:
        """Differences `[count]` of one map `[c]` on the first windows of the split, nats a token."""
        found = np.zeros(count)
        for index in np.flatnonzero(chosen):
            found += self._component(int(index))[:count, chosen[index]]
        return found

    def _noise(self, steps: Floats) -> Floats:
        """Centred gamma variables of shapes `steps [...]` for each window, `[w, ...]`, in part of its document."""
        own: Floats = self._rng.standard_gamma(steps, size=(self._scale.size, *steps.shape)) - steps
        if self.sources is None:
            return own
        shared = self._rng.standard_gamma(steps, size=(int(self.sources.max()) + 1, *steps.shape)) - steps
        mixed: Floats = math.sqrt(1 - self._alike) * own + math.sqrt(self._alike) * shared[self.sources]
        return mixed

    def _component(self, index: int) -> Floats:
        """Differences `[w, p]` of one component, each precision adding to the one before it."""
        if index not in self._drawn:
            steps = self._steps[index]
            noise = self._noise(steps).cumsum(axis=1)
            self._drawn[index] = self._effects[index] + noise * self._scale[:, None]
        return self._drawn[index]


def smallest_within(world: World, effects: Floats) -> Ints:
    """The smallest of all maps whose `effects [c, p]` add up to at most the budget: `[c]`.

    Exact, by meeting in the middle. The widest map has no effect, so there always is one.
    """
    sizes = world.sizes
    half, precisions = sizes.shape[0] // 2, sizes.shape[1]
    left, right = _every(half, precisions), _every(sizes.shape[0] - half, precisions)
    costs = total(effects[half:], right)
    order = np.argsort(costs, kind="stable")
    right, costs = right[order], costs[order]
    right_bytes = total(sizes[half:], right)
    least = np.minimum.accumulate(right_bytes)
    fits = np.searchsorted(costs, world.budget - total(effects[:half], left), side="right")
    totals = np.where(fits > 0, total(sizes[:half], left) + least[fits - 1], np.inf)
    best = int(totals.argmin())
    partner = int(right_bytes[: fits[best]].argmin())
    return np.concatenate([left[best], right[partner]])


def _every(components: int, precisions: int) -> Ints:
    """All maps of so many components, `[precisions ** components, components]`."""
    return np.indices((precisions,) * components).reshape(components, -1).T


def propose(world: World, measured: Floats, known: Ints, count: int, rng: np.random.Generator) -> Ints:
    """`count` maps `[count, c]` to try: those predicted best from the measured effects, then changes near the budget.

    known `[m, c]`: what was tried before. Proposals may repeat one another; the front takes no notice.
    """
    components, precisions = measured.shape
    found = [smallest_within(world, measured)]
    for price in np.geomspace(0.1, 10, 16) * world.sizes[:, 0].sum() / world.budget:
        found.append((world.sizes + price * measured).argmin(axis=1))
    predicted = np.stack(found)[:count]
    maps = np.concatenate([known, predicted])
    near = maps[np.abs(total(measured, maps) - world.budget).argsort(kind="stable")[:12]]
    changed = near[rng.integers(len(near), size=count - len(predicted))]
    rows = np.arange(len(changed))
    for _ in range(2):
        changed[rows, rng.integers(components, size=len(rows))] = rng.integers(precisions, size=len(rows))
    return np.concatenate([predicted, changed])
