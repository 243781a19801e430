"""A search space as plain numbers: what each free component may become and what that takes.

A group of components that move together is one component here.

Dimensions: `n` free components, `f` features (component, precision other than the widest), `m` maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from search.problem.space import Space
from ssm_mp.components import fp32_bytes
from ssm_mp.evaluation.latency import LatencyTable
from ssm_mp.scheme import ActivationScheme

Choices = np.ndarray
"""Maps as choice indices, int64 `[m, n]`: 0 the widest precision of a component."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Free components with their precisions (the widest first) and stored bytes; `fixed` bytes of all others.

    latencies: nanoseconds, as `sizes`, and `fixed_latency` as `fixed`; None where latency is no objective.
    """

    names: tuple[str, ...]
    precisions: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    fixed: int
    fp32_bytes: int
    latencies: tuple[tuple[int, ...], ...] | None = None
    fixed_latency: int = 0

    @cached_property
    def features(self) -> tuple[tuple[int, int], ...]:
        """(component, choice) of every feature, the widest choices left out."""
        return tuple((c, k) for c, held in enumerate(self.precisions) for k in range(1, len(held)))

    @property
    def maps(self) -> int:
        """Number of different maps."""
        return int(np.prod([len(held) for held in self.precisions], dtype=object))

    def encode(self, chosen: Mapping[str, str]) -> np.ndarray:
        """Choice indices `[n]` of a trial's parameters."""
        pairs = zip(self.names, self.precisions, strict=True)
        return np.array([held.index(chosen[name]) for name, held in pairs], dtype=np.int64)

    def decode(self, choices: Sequence[int] | np.ndarray) -> dict[str, str]:
        """A trial's parameters of choice indices `[n]`."""
        return {name: held[int(k)] for name, held, k in zip(self.names, self.precisions, choices, strict=True)}

    def one_hot(self, choices: Choices) -> np.ndarray:
        """Features of maps `[m, n]` → float64 `[m, f]`."""
        index = np.array(self.features, dtype=np.int64).reshape(-1, 2)
        return np.asarray(choices[:, index[:, 0]] == index[:, 1], dtype=float)

    def bytes(self, choices: Choices) -> np.ndarray:
        """Stored bytes of maps `[m, n]` → int64 `[m]`."""
        total = np.full(len(choices), self.fixed, dtype=np.int64)
        for c, sizes in enumerate(self.sizes):
            total += np.array(sizes)[choices[:, c]]
        return total

    @property
    def by_latency(self) -> Catalogue:
        """The same space with nanoseconds in place of bytes."""
        assert self.latencies is not None
        return replace(self, sizes=self.latencies, fixed=self.fixed_latency)

    def blended(self, share: float) -> Catalogue:
        """The same space with a blend in place of bytes: `share` of it bytes, the rest latency, each over its range."""
        assert self.latencies is not None
        weights = (share / (_range(self.sizes) or 1), (1 - share) / (_range(self.latencies) or 1))
        blend = tuple(
            tuple(round(_BLEND * (weights[0] * size + weights[1] * time)) for size, time in zip(*held, strict=True))
            for held in zip(self.sizes, self.latencies, strict=True)
        )
        return replace(self, sizes=blend, fixed=0)

    @property
    def latency_reference(self) -> int:
        """Corner of the hypervolume in nanoseconds: as far beyond the slowest map as that is behind the fastest."""
        assert self.latencies is not None
        slowest, spread = self.fixed_latency + sum(map(max, self.latencies)), _range(self.latencies)
        return slowest + (spread or slowest)


_BLEND = 1_000_000
"""A blend counts in millionths of the range between the least and the largest map."""


def _range(sizes: Sequence[Sequence[int]]) -> int:
    """From the least to the largest sum of one choice a component."""
    return sum(max(held) - min(held) for held in sizes)


def catalogue_of(space: Space, scheme: ActivationScheme, latency: LatencyTable | None = None) -> Catalogue:
    """The numbers of a space, with the latencies of a table where latency is an objective."""
    units = space.units
    precisions = tuple(unit.choices for unit in units)
    sizes = tuple(tuple(unit.bytes(p, scheme) for p in unit.choices) for unit in units)
    fixed = space.widest().bytes(space.components, scheme) - sum(held[0] for held in sizes)
    found = Catalogue(tuple(unit.name for unit in units), precisions, sizes, fixed, fp32_bytes(space.components))
    if latency is None:
        return found
    times = tuple(
        tuple(sum(round(1e9 * latency.seconds[member.name][p]) for member in unit.members) for p in unit.choices)
        for unit in units
    )
    return replace(found, latencies=times, fixed_latency=round(1e9 * latency.predict({})) - sum(t[0] for t in times))
