"""The best maps of an additive cost at every size, by dynamic programming (Nemhauser & Ullmann 1969).

Dimensions: `n` components, `s` states kept, `m` maps of the front.

Components are added one after another; of all partial maps only those stay that no smaller one beats. That is
exact. Where more than `most` would stay, they are thinned to the best of each of `most` equal ranges of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_STATES = 4096


@dataclass(frozen=True, eq=False)
class Frontier:
    """Maps that no other beats, the smallest first: bytes int64 `[m]`, cost `[m]`, choices `[m, n]`."""

    bytes: np.ndarray
    cost: np.ndarray
    choices: np.ndarray


def frontier(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], most_cost: float, most: int = MOST_STATES
) -> Frontier:
    """All undominated maps of at most `most_cost`, a map's cost being the sum of its components'.

    sizes, costs: for each component, one number a choice.
    """
    lowest = np.array([min(held) for held in costs])
    to_come = np.append(np.cumsum(lowest[::-1])[::-1], 0.0)  # least cost of the components from each on
    held_bytes, held_cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for c, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        grown_bytes = (held_bytes[:, None] + np.array(size, dtype=np.int64)).ravel()
        grown_cost = (held_cost[:, None] + np.array(cost)).ravel()
        kept = _undominated(grown_bytes, grown_cost, most_cost - to_come[c + 1], most)
        trail.append(np.divmod(kept, len(size)))
        held_bytes, held_cost = grown_bytes[kept], grown_cost[kept]
    state = np.arange(len(held_bytes))
    choices = np.zeros((len(state), len(trail)), dtype=np.int64)
    for c in range(len(trail) - 1, -1, -1):
        parents, chosen = trail[c]
        choices[:, c] = chosen[state]
        state = parents[state]
    return Frontier(held_bytes, held_cost, choices)


def _undominated(size: np.ndarray, cost: np.ndarray, most_cost: float, most: int) -> np.ndarray:
    """Indices of the states that stay, by rising bytes (and so by falling cost)."""
    order: np.ndarray = np.lexsort((cost, size))
    order = order[cost[order] <= most_cost]
    if not order.size:
        return order
    least = np.minimum.accumulate(cost[order])
    kept: np.ndarray = order[np.append(True, cost[order][1:] < least[:-1])]
    if len(kept) <= most:
        return kept
    span = size[kept[-1]] - size[kept[0]]
    bucket = (size[kept] - size[kept[0]]) * most // (span + 1)
    last = np.append(bucket[1:] != bucket[:-1], True)  # the cheapest of a range is its largest
    last[0] = True
    return np.asarray(kept[last])


def frontier_reference(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], most_cost: float
) -> list[tuple[int, float]]:
    """(bytes, cost) of the same maps, by trying all of them."""
    found = [(0, 0.0)]
    for size, cost in zip(sizes, costs, strict=True):
        found = [(b + s, c + e) for b, c in found for s, e in zip(size, cost, strict=True)]
    front: list[tuple[int, float]] = []
    for b, c in sorted(found):
        if c <= most_cost and (not front or c < front[-1][1]):
            front.append((b, c))
    return front
