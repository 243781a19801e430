"""The Pareto front of compression against the increase of the metric, and latency where it is asked for; its
hypervolume."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from search.base.metric import PERPLEXITY, Metric


@dataclass(frozen=True)
class Point:
    """One evaluated map: what a trial measured on the search windows, paired against the FP32 checkpoint.

    increase_percent, stderr_percent: on the scale of `metric.py`.
    stopped: why it was not measured on all windows, None where it was. latency: predicted, in seconds, None where the
    study does not ask for it.
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
    latency: float | None = None

    def to_json(self, metric: Metric = PERPLEXITY) -> dict[str, Any]:
        """As the command line reports it."""
        figures = {"increase_percent": self.increase_percent, "stderr_percent": self.stderr_percent}
        return {
            "trial": self.trial,
            "compression": self.compression,
            "bytes": self.bytes,
            "perplexity": self.perplexity,
            **metric.answer(figures),
            "windows": self.windows,
            "origin": self.origin,
            **({} if self.latency is None else {"latency_seconds": self.latency}),
            "map": dict(self.map),
        }


def pareto_front(points: Sequence[Point], budget_percent: float) -> list[Point]:
    """The points within the budget that no other point beats, the smallest map first.

    A point is beaten by one that is at least as small, as good and (where latency is known) as fast, and better in
    one of these; of equal ones the earliest trial stays. A map that was stopped early is never on the front.
    """
    within = [point for point in points if point.increase_percent <= budget_percent and point.stopped is None]
    front: list[Point] = []
    # of the points so far, all at least as small: (increase, latency) that no other beats, by rising increase
    increases: list[float] = []
    latencies: list[float] = []
    for point in sorted(within, key=lambda p: (p.bytes, p.increase_percent, _latency(p), p.trial)):
        at = bisect_right(increases, point.increase_percent)
        if at and latencies[at - 1] <= _latency(point):
            continue
        front.append(point)
        worse = at
        while worse < len(latencies) and latencies[worse] >= _latency(point):
            worse += 1
        if at and increases[at - 1] == point.increase_percent:
            at -= 1
        increases[at:worse], latencies[at:worse] = [point.increase_percent], [_latency(point)]
    return front


def _latency(point: Point) -> float:
    """Where no latency is known, all are equal."""
    return 0.0 if point.latency is None else point.latency


def front_by_size(front: Sequence[Point]) -> list[Point]:
    """Of a front, the points that are on it for size and quality alone, the smallest map first."""
    found: list[Point] = []
    for point in front:
        if not found or point.increase_percent < found[-1].increase_percent:
            found.append(point)
    return found


def fastest(front: Sequence[Point]) -> Point | None:
    """The point of least latency, of equal ones the smallest; None where there is none, or latency is not known."""
    known = [point for point in front if point.latency is not None]
    return min(known, key=lambda p: (_latency(p), p.bytes), default=None)


REFERENCE_COMPRESSION = 1.0
"""Corner of the hypervolume: a map that is no smaller than FP32."""


def hypervolume(
    points: Sequence[Point],
    budget_percent: float,
    reference_compression: float = REFERENCE_COMPRESSION,
    metric: Metric = PERPLEXITY,
) -> float:
    """Area dominated between the points and the corner (reference compression, budget): × times percentage points, or
    times the metric's own unit."""
    area, ceiling = 0.0, metric.shown(budget_percent)
    front = front_by_size(pareto_front(points, budget_percent))
    for point in sorted(front, key=lambda p: -p.increase_percent):
        width = point.compression - reference_compression
        if width > 0:
            increase = metric.shown(point.increase_percent)
            area += width * (ceiling - increase)
            ceiling = increase
    return area


def hypervolume_with_latency(
    points: Sequence[Point], budget_percent: float, reference_latency: float, metric: Metric = PERPLEXITY
) -> float:
    """Volume dominated up to the corner (compression 1, budget, reference latency in seconds): × times percentage
    points (or the metric's unit) times the fraction of the reference latency that is saved.

    Slice by slice of latency: between two latencies the area is that of all maps at least as fast.
    """
    front = sorted(pareto_front(points, budget_percent), key=_latency)
    edges = [*(min(_latency(point), reference_latency) for point in front), reference_latency]
    volume = 0.0
    for number, (began, ended) in enumerate(pairwise(edges)):
        if ended > began:
            volume += (
                (ended - began) / reference_latency * hypervolume(front[: number + 1], budget_percent, metric=metric)
            )
    return volume


def knee(front: Sequence[Point]) -> Point | None:
    """The point farthest below the straight line between the front's ends, both axes scaled to one.

    Of size and quality: of a front of three objectives only what is on it without the third.
    """
    front = front_by_size(front)
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
