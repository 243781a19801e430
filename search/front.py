"""The Pareto front of compression against perplexity increase, its hypervolume and its knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One evaluated map: what a trial measured on the search windows, paired against the FP32 checkpoint.

    stopped: why it was not measured on all windows, None where it was.
    """

    trial: int
    compression: float
    bytes: int
    perplexity: float
    increase_percent: float
    stderr_percent: float
    map: Mapping[str, str]
    origin: str
    windows: int = 0
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As the command line reports it."""
        return {
            "trial": self.trial,
            "compression": self.compression,
            "bytes": self.bytes,
            "perplexity": self.perplexity,
            "increase_percent": self.increase_percent,
            "stderr_percent": self.stderr_percent,
            "windows": self.windows,
            "origin": self.origin,
            "map": dict(self.map),
        }


def pareto_front(points: Sequence[Point], budget_percent: float) -> list[Point]:
    """The points within the budget that no other point beats, the smallest map first.

    A point is beaten by one that is at least as small and at least as good, and better in one of the two; of
    equal ones the earliest trial stays. A map that was stopped early is never on the front.
    """
    within = [point for point in points if point.increase_percent <= budget_percent and point.stopped is None]
    front: list[Point] = []
    best = float("inf")
    for point in sorted(within, key=lambda p: (p.bytes, p.increase_percent, p.trial)):
        if point.increase_percent < best:
            front.append(point)
            best = point.increase_percent
    return front


REFERENCE_COMPRESSION = 1.0
"""Corner of the hypervolume: a map that is no smaller than FP32."""


def hypervolume(
    points: Sequence[Point], budget_percent: float, reference_compression: float = REFERENCE_COMPRESSION
) -> float:
    """Area dominated between the points and the corner (reference compression, budget): × times percentage points."""
    area, ceiling = 0.0, budget_percent
    for point in sorted(pareto_front(points, budget_percent), key=lambda p: -p.increase_percent):
        width = point.compression - reference_compression
        if width > 0:
            area += width * (ceiling - point.increase_percent)
            ceiling = point.increase_percent
    return area


def knee(front: Sequence[Point]) -> Point | None:
    """The point farthest below the straight line between the front's ends, both axes scaled to one."""
    if len(front) < 3:
        return front[0] if front else None
    small, good = front[0], front[-1]
    width = small.compression - good.compression
    height = small.increase_percent - good.increase_percent

    def depth(point: Point) -> float:
        across = (point.compression - good.compression) / width
        up = (point.increase_percent - good.increase_percent) / height
        return across - up

    return max(front, key=depth)
