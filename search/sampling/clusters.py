"""Things of like sensitivity, put together into a bounded number of clusters.

Dimensions: `n` things, `k` clusters.

At a price of so much perplexity for a byte, the additive optimum lowers exactly what costs less than that for each byte
it saves. So clusters are contiguous in the order of that ratio, and a cluster loses by the things that a price would
divide: the farther their ratios are apart, in proportion, and the more bytes they have, the more. The loss of a cluster
is the spread of log-ratios around their mean, weighted by bytes; the sum over clusters is least, exactly, by dynamic
programming (Fisher 1958, "On Grouping for Maximum Homogeneity").
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

_LEAST = 0.01
"""Ratios below this part of the mean count as this: what costs next to nothing is alike, whatever its sign."""


def sensitivities(cost: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """Logarithms `[n]` of the ratios of costs to bytes saved, `[n]` each."""
    mean = np.maximum(cost, 0).sum() / saved.sum()
    if mean <= 0:
        return np.zeros(len(cost))
    return np.asarray(np.log(np.maximum(cost / saved, _LEAST * mean)))


def clusters(position: np.ndarray, weight: np.ndarray, kinds: Sequence[Hashable], most: int) -> list[list[int]]:
    """At most `most` clusters of indices that lose least, and never two kinds in one; by rising position.

    Raises ValueError where there are more kinds than clusters.
    """
    members = {kind: [i for i, held in enumerate(kinds) if held == kind] for kind in dict.fromkeys(kinds)}
    if len(members) > most:
        raise ValueError(f"{len(members)} kinds do not fit into {most} clusters")
    ordered = [sorted(held, key=lambda i: (position[i], i)) for held in members.values()]
    room = most - len(members) + 1
    tables = [_divisions(position[order], weight[order], min(room, len(order))) for order in ordered]
    found = []
    for order, (_, begins), count in zip(ordered, tables, _shares([loss for loss, _ in tables], most), strict=True):
        edges = [*_edges(begins, count), len(order)]
        found += [order[began:ended] for began, ended in itertools.pairwise(edges)]
    return sorted(found, key=lambda held: (float(np.average(position[held], weights=weight[held])), held[0]))


def _divisions(position: np.ndarray, weight: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Of things in order: the least loss in 1 to `most` clusters `[k]`, and where the last cluster of the first `e`
    things in `k` clusters begins, `[k, n + 1]`."""
    n = len(position)
    sums = [np.append(0.0, np.cumsum(weight * (position - position.mean()) ** power)) for power in (0, 1, 2)]

    def losses(ended: int) -> np.ndarray:
        """Loss of the cluster of things `began` to `ended`, for every `began` before it."""
        mass, first, second = (total[ended] - total[:ended] for total in sums)
        return np.asarray(np.maximum(second - first**2 / mass, 0.0))

    best = np.full((most, n + 1), np.inf)
    begins = np.zeros((most, n + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for ended in range(1, n + 1):
        last = losses(ended)
        best[0, ended] = last[0]
        for k in range(1, min(most, ended)):
            total = best[k - 1, :ended] + last
            begins[k, ended] = k + int(total[k:].argmin())  # each cluster before it holds at least one
            best[k, ended] = total[begins[k, ended]]
    return best[:, n], begins


def _edges(begins: np.ndarray, count: int) -> list[int]:
    """Where each of `count` clusters begins."""
    edges, ended = [], begins.shape[1] - 1
    for k in range(count - 1, -1, -1):
        ended = int(begins[k, ended])
        edges.append(ended)
    return edges[::-1]


def _shares(losses: Sequence[np.ndarray], most: int) -> list[int]:
    """How many clusters each kind gets so that the sum of losses is least: `losses[kind][k]` in k + 1 clusters."""
    best, trail = np.zeros(1), []  # best[c]: least loss in c clusters of the kinds so far
    for loss in losses:
        grown = np.full(min(most, len(best) - 1 + len(loss)) + 1, np.inf)
        chosen = np.zeros(len(grown), dtype=np.int64)
        for k, lost in enumerate(loss, start=1):
            ends = min(len(grown), len(best) + k)
            total = best[: ends - k] + lost
            better = total < grown[k:ends]
            grown[k:ends][better], chosen[k:ends][better] = total[better], k
        trail.append(chosen)
        best = grown
    counts, left = [], int(best.argmin())
    for chosen in reversed(trail):
        counts.append(int(chosen[left]))
        left -= counts[-1]
    return counts[::-1]


def loss_of(position: np.ndarray, weight: np.ndarray, held: Sequence[Sequence[int]]) -> float:
    """The loss of a division into clusters, as it is defined."""
    return float(
        sum(
            (weight[list(c)] * (position[list(c)] - np.average(position[list(c)], weights=weight[list(c)])) ** 2).sum()
            for c in held
        )
    )
