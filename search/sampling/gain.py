"""Expected hypervolume gain of maps whose size (and latency) is known and whose perplexity increase is predicted.

Dimensions: `m` maps, `k` steps of the front; with latency `i` ranges of compression times `j` of latency saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from search.base.front import REFERENCE_COMPRESSION


@dataclass(frozen=True, eq=False)
class Staircase:
    """What is dominated so far: between compressions `edges[i]` and `edges[i + 1]` the best increase is `height[i]`.

    edges: rising, `[k + 1]`, the first the reference, the last infinite; heights in percent, `[k]`, the last the
    budget (nothing reaches so far).
    """

    edges: np.ndarray
    heights: np.ndarray


def staircase(compression: np.ndarray, increase_percent: np.ndarray, budget_percent: float) -> Staircase:
    """The staircase of evaluated maps, `[m]` each."""
    order = np.argsort(-compression)
    edges, heights = [np.inf], [budget_percent]
    for reach, increase in zip(compression[order], increase_percent[order], strict=True):
        if reach <= REFERENCE_COMPRESSION:
            break
        if increase < heights[-1]:
            edges.append(float(reach))
            heights.append(float(increase))
    edges.append(REFERENCE_COMPRESSION)
    return Staircase(np.array(edges[::-1]), np.array(heights[::-1]))


def area(stairs: Staircase, budget_percent: float) -> float:
    """The dominated area, × times percentage points: `front.hypervolume` of the same maps."""
    width = np.diff(stairs.edges)[:-1]  # nothing reaches into the last step
    return float((width * (budget_percent - stairs.heights[:-1])).sum())


def expected_gain(stairs: Staircase, compression: np.ndarray, mean: np.ndarray, stddev: np.ndarray) -> np.ndarray:
    """Expected growth of the dominated area, × times percentage points, for each of `m` maps on its own: `[m]`.

    mean, stddev: of each map's increase in percent, taken as normal. Below a height h the expected gain is
    E[(h − y)₊] = (h − mean) Φ(z) + stddev φ(z), over the width of compression that the map reaches.
    """
    width = _covered(stairs.edges, compression)  # [m, k]
    return np.asarray((width * _expected_below(stairs.heights, mean, stddev)).sum(axis=1))


def _expected_below(heights: np.ndarray, mean: np.ndarray, stddev: np.ndarray) -> np.ndarray:
    """E[(h − y)₊] of each height `[k]` for each map's normal y: `[m, k]`."""
    below = heights - mean[:, None]
    z = below / stddev[:, None]
    density = np.exp(-0.5 * np.minimum(z * z, 1e3)) / np.sqrt(2 * np.pi)
    return np.asarray(below * ndtr(z) + stddev[:, None] * density)


MOST_RANGES = 40
"""Ranges on each axis of a terrain; a larger front is looked at through a coarser grid, to stay quick."""
_CHUNK = 1 << 20
"""Cells (of all maps) looked at in one piece."""


@dataclass(frozen=True, eq=False)
class Terrain:
    """The staircase of three objectives: over each cell of compression and latency saved the best increase so far.

    compression, saved: edges of the cells, `[i + 1]` and `[j + 1]`, as those of a staircase; saved is a fraction of the
    reference latency; heights: percent, `[i, j]`, the budget where nothing reaches.
    """

    compression: np.ndarray
    saved: np.ndarray
    heights: np.ndarray


def terrain(
    compression: np.ndarray,
    saved: np.ndarray,
    increase_percent: np.ndarray,
    budget_percent: float,
    most: int = MOST_RANGES,
) -> Terrain:
    """The terrain of evaluated maps, `[m]` each; exact up to `most` different compressions and latencies."""
    inside = (increase_percent < budget_percent) & (compression > REFERENCE_COMPRESSION) & (saved > 0)
    reaches, rises = np.stack([compression, saved], axis=1)[inside], increase_percent[inside]
    kept = _unbeaten(reaches, rises)
    reaches, rises = reaches[kept], rises[kept]
    edges = [_edges(values, least, most) for values, least in zip(reaches.T, (REFERENCE_COMPRESSION, 0.0), strict=True)]
    heights = np.full((len(edges[0]) - 1, len(edges[1]) - 1), budget_percent)
    # the edge nearest to each map; it covers all cells below
    at = [np.searchsorted((e[1:-1] + e[:-2]) / 2, v) - 1 for e, v in zip(edges, reaches.T, strict=True)]
    reached = (at[0] >= 0) & (at[1] >= 0)
    np.minimum.at(heights, (at[0][reached], at[1][reached]), rises[reached])
    for axis in (0, 1):
        heights = np.flip(np.minimum.accumulate(np.flip(heights, axis), axis=axis), axis)
    return Terrain(edges[0], edges[1], heights)


def _unbeaten(reaches: np.ndarray, rises: np.ndarray) -> np.ndarray:
    """Which maps no other beats: reaches `[m, 2]` (more is better), rises `[m]` (less is better) → bool `[m]`."""
    no_worse = (reaches[:, None] >= reaches).all(axis=2) & (rises[:, None] <= rises)  # [m, m]
    return np.asarray(~(no_worse & ~no_worse.T).any(axis=0))


def _edges(values: np.ndarray, least: float, most: int) -> np.ndarray:
    """`least`, at most `most` of the different values, infinity."""
    different = np.unique(values)
    if len(different) > most:
        different = different[np.linspace(0, len(different) - 1, most).round().astype(int)]
    return np.array([least, *different, np.inf])


def volume(ground: Terrain, budget_percent: float) -> float:
    """The dominated volume: `front.hypervolume_with_latency` of the same maps."""
    across, along = np.diff(ground.compression)[:-1], np.diff(ground.saved)[:-1]
    return float(across @ (budget_percent - ground.heights[:-1, :-1]) @ along)


def expected_volume_gain(
    ground: Terrain, compression: np.ndarray, saved: np.ndarray, mean: np.ndarray, stddev: np.ndarray
) -> np.ndarray:
    """Expected growth of the volume for each of `m` maps on its own, `[m]`, as `expected_gain` is of the area."""
    flat = ground.heights.ravel()
    found = []
    step = max(1, _CHUNK // flat.size)
    for start in range(0, len(mean), step):
        part = slice(start, start + step)
        across = _covered(ground.compression, compression[part])  # [m, i]
        along = _covered(ground.saved, saved[part])  # [m, j]
        below = _expected_below(flat, mean[part], stddev[part]).reshape(-1, *ground.heights.shape)
        found.append(np.einsum("mi,mij,mj->m", across, below, along, optimize=True))
    return np.concatenate(found) if found else np.zeros(0)


def _covered(edges: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """How much of each range each map reaches: edges `[i + 1]`, reach `[m]` → `[m, i]`."""
    return np.asarray(np.clip(np.minimum(reach[:, None], edges[1:]) - edges[:-1], 0.0, None))
