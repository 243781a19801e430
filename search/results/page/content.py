"""What the page shows of a search, as plain values: increases in the metric's unit, bytes, maps as indexes.

Dimensions: `t` finished trials, `c` components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.base.front import Point, fastest, hypervolume, knee, pareto_front
from search.base.metric import PERPLEXITY, Metric
from search.measure.probe import LOWEST, Probe
from search.results.certify import Certificate
from search.results.gates import Gate
from search.results.plots.style import precision_colours
from search.results.tested import basis, head_of, order, rows_of

_LARGEST_LOG = 100.0
"""Log-perplexity that is shown; more is no number that a page can hold."""


@dataclass(frozen=True, eq=False)
class PageContent:
    """A search as the page shows it, while it runs or after it.

    name: the study's. export: the command that exports a trial, whose number stands between its parts; export_winner:
    that of the winner. said: the certificate in a sentence.
    components: rows as a run directory keeps them, with `bytes` by precision. growth: finished trials → hypervolume.
    gates, figures, provenance, drift: as answers hold them; empty where there are none (yet). asked: trials asked for.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    export: tuple[str, str, str]
    export_winner: str
    metric: Metric
    budget_percent: float
    baseline: Mapping[str, Any]
    components: Sequence[Mapping[str, Any]]
    points: Sequence[Point]
    probes: Sequence[Probe]
    growth: Sequence[tuple[int, float]]
    certificate: Certificate | None
    said: str
    asked: int
    target: str | None = None
    gates: Sequence[Gate] = ()
    beside: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def winner(self) -> Point | None:
        """The certified point."""
        trial = None if self.certificate is None else self.certificate.winner
        return next((point for point in self.points if point.trial == trial), None)

    @property
    def front(self) -> list[Point]:
        """The points that no other beats, the smallest first."""
        return pareto_front(self.points, self.budget_percent)

    @property
    def tested(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Head and rows of the table of tested maps; no rows where nothing was tested."""
        rows = [] if self.certificate is None else rows_of(self.certificate, self.metric)
        return head_of(self.metric), [[cell.replace("*", "") for cell in row] for row in rows]

    @property
    def basis(self) -> str:
        """What the certificate's bounds speak of, and the order of its tests; empty where there is none."""
        return "" if self.certificate is None else f"{basis(self.certificate)} {order(self.certificate)}"

    @property
    def hypervolume(self) -> float:
        """Of all points."""
        return hypervolume(self.points, self.budget_percent, metric=self.metric)

    @property
    def hypervolume_unit(self) -> str:
        """What the hypervolume is counted in."""
        return f"× times {'percentage points' if self.metric is PERPLEXITY else self.metric.unit}"

    def to_json(self) -> dict[str, Any]:
        """What the page's script draws from."""
        front, metric = self.front, self.metric
        middle, quickest = knee(front), fastest(front)
        used = [*dict.fromkeys(name for row in self.components for name in row["bytes"])]
        colours = precision_colours()
        precisions = [name for name in colours if name in used] + [name for name in used if name not in colours]
        return {
            "name": self.name,
            "export": list(self.export),
            "exportWinner": self.export_winner,
            "metric": {
                "word": metric.word, "rises": metric.rises, "unit": metric.unit, "axis": metric.axis,
                "digits": metric.digits,
            },
            "budget": metric.shown(self.budget_percent),
            "baseline": dict(self.baseline),
            "target": self.target,
            "said": self.said,
            "precisions": [{"name": name, "colour": colours.get(name, "#999999")} for name in precisions],
            "components": [dict(row) for row in self.components],
            "trials": _trials(self.points, self.components, precisions, metric),
            "front": [point.trial for point in front],
            "winner": None if self.winner is None else self.winner.trial,
            "knee": None if middle is None else middle.trial,
            "fastest": None if quickest is None else quickest.trial,
            "sensitivities": sensitivities(self.probes, self.components, self.groups, metric),
            "growth": [list(step) for step in self.growth],
            "drift": _drift(self.drift, self.points),
        }  # fmt: skip


def _trials(
    points: Sequence[Point], components: Sequence[Mapping[str, Any]], precisions: Sequence[str], metric: Metric
) -> list[dict[str, Any]]:
    """A row a trial; its map as one index into `precisions` for each component `[c]`, parted by spaces."""
    number = {name: str(i) for i, name in enumerate(precisions)}
    return [
        {
            "trial": point.trial,
            "compression": point.compression,
            "bytes": point.bytes,
            "perplexity": point.perplexity,
            "increase": metric.shown(point.increase_percent),
            "spread": 1.96 * metric.spread(point.increase_percent, point.stderr_percent),
            "windows": point.windows,
            "origin": point.origin,
            "stopped": point.stopped,
            "latency": point.latency,
            "map": " ".join(number[point.map[row["name"]]] for row in components),
        }
        for point in points
    ]


def sensitivities(
    probes: Sequence[Probe],
    components: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    metric: Metric,
) -> list[dict[str, Any]]:
    """A row for each component (or group) and precision, the costliest first.

    cost, spread: of lowering it alone, with the half width of the 95 % interval; back: of having it low where all
    others are at their lowest, None where that was not measured. saved: bytes that it saves.
    """
    size = {row["name"]: row["bytes"] for row in components}
    raised = {(probe.component, probe.origin): probe for probe in probes if probe.end == LOWEST}
    rows = []
    for probe in probes:
        if probe.end == LOWEST:
            continue
        cost, spread = _cost(probe, metric)
        other = raised.get((probe.component, probe.precision))
        back, back_spread = (None, None) if other is None else _cost(other, metric)
        members = groups.get(probe.component, (probe.component,))
        rows.append(
            {
                "component": probe.component,
                "members": list(members),
                "from": probe.origin,
                "precision": probe.precision,
                "saved": sum(size[name][probe.origin] - size[name][probe.precision] for name in members),
                "cost": cost,
                "spread": spread,
                "back": None if back is None else -back,
                "backSpread": back_spread,
            }
        )
    return sorted(rows, key=lambda row: -float(row["cost"]))


def _cost(probe: Probe, metric: Metric) -> tuple[float, float]:
    """The increase of a probe and the half width of its interval, in the metric's unit."""
    log = min(_LARGEST_LOG, probe.log_increase)
    percent, stderr_percent = 100 * math.expm1(log), 100 * math.exp(log) * probe.log_stderr
    return metric.shown(percent), 1.96 * metric.spread(percent, stderr_percent)


def _drift(found: Mapping[str, Any], points: Sequence[Point]) -> list[dict[str, Any]]:
    """The drifts of this study's maps, with the trial that each is of; of other maps nothing is shown."""
    trial_of = {tuple(sorted(point.map.items())): point.trial for point in reversed(points)}
    rows = []
    for path, measured in found.items():
        trial = trial_of.get(tuple(sorted(measured["map"].items())))
        if trial is not None:
            rows.append({"path": path, "trial": trial, "windows": measured["windows"], "long": measured["long"]})
    return rows
