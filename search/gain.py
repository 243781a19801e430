"""Expected hypervolume gain of maps whose size is known and whose perplexity increase is predicted.

Dimensions: `m` maps, `k` steps of the front.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from search.front import REFERENCE_COMPRESSION


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
    low, high = stairs.edges[:-1], stairs.edges[1:]
    width = np.clip(np.minimum(compression[:, None], high) - low, 0.0, None)  # [m, k]
    below = stairs.heights - mean[:, None]
    z = below / stddev[:, None]
    density = np.exp(-0.5 * np.minimum(z * z, 1e3)) / np.sqrt(2 * np.pi)
    return np.asarray((width * (below * ndtr(z) + stddev[:, None] * density)).sum(axis=1))
