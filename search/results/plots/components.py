"""The two pictures of a study's components, legible and of bounded size for any number of them: what each costs at
lower precision, and what a map makes of it."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from search.base.metric import PERPLEXITY, Metric
from search.measure.probe import LOWEST, Probe
from search.problem.groups import NO_GROUPS, Groups
from search.results.plots.style import BLACK, BLUE, ORANGE, STYLE, precision_colours
from ssm_mp.components import Component
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme

_MOST_ROWS = 60
"""Sensitivities shown one by one; the others are summed."""
_MOST_LAYER_ROWS = 40
"""Layers shown one by one; of more, neighbours share a row."""
_MOST_STRIPS = 12
"""Components shown one by one in a cell; of more, each precision's share."""
_LONGEST_LABEL = 48
_MOST_IN_A_LINE = 10
_LARGEST = 24.0
"""Inches a side, 3600 pixels."""
_LARGEST_LOG = 100.0
"""Log-perplexity that is drawn; more is no number that a picture can hold."""


@dataclass(frozen=True)
class _Row:
    """One row of the sensitivities, in the metric's unit: lowered alone, and (where measured) low over raised."""

    label: str
    increase: float
    stderr: float
    back: float | None
    back_stderr: float
    summed: bool = False


def plot_sensitivities(
    probes: Sequence[Probe],
    components: Sequence[Component],
    groups: Groups = NO_GROUPS,
    metric: Metric = PERPLEXITY,
) -> Figure:
    """Cost of lowering each component or group, measured from both ends, the costliest on top.

    Beyond the 60 costliest, the others are summed, a row for each precision.
    """
    rows = _sensitivities(probes, components, groups, metric)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, min(_LARGEST, 1.6 + 0.27 * len(rows))), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            if not row.summed:
                _draw_row(axes, y, row)
        left, right = axes.get_xlim()  # of single components: a sum may be far larger, and would hide them
        axes.set_xlim(min(left, 0), right)
        for y, row in enumerate(rows):
            if row.summed:
                _draw_sum(axes, y, row, metric.unit)
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8.5)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel(f"{metric.rises} cost of the lower precision ({metric.unit}), 95 % interval")
        figure.suptitle(
            "What each component costs at lower precision (in brackets: its share of the parameters)",
            fontsize=10.5, x=0.01, ha="left",
        )  # fmt: skip
        handles = [
            Line2D([], [], marker="o", color=BLUE, linestyle="none", label="lowered alone, others at their widest"),
            Line2D([], [], marker="s", color=ORANGE, linestyle="none", label="low over raised, others at their lowest"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _sensitivities(
    probes: Sequence[Probe], components: Sequence[Component], groups: Groups, metric: Metric
) -> list[_Row]:
    """The rows from the bottom: sums of the cheapest, then what is shown one by one, the costliest last."""
    share = {component.name: component.count for component in components}
    total = sum(share.values())
    share |= {name: sum(share[member] for member in members) for name, members in groups.items()}
    raised = {(p.component, p.origin): p for p in probes if p.end == LOWEST}
    lowered = sorted((p for p in probes if p.end != LOWEST), key=lambda p: p.log_increase)
    cut = max(0, len(lowered) - _MOST_ROWS)
    summed: dict[str, list[Probe]] = {}
    for probe in lowered[:cut]:
        summed.setdefault(probe.precision, []).append(probe)
    alone = [group[0] for group in summed.values() if len(group) == 1] + lowered[cut:]
    rows = []
    for precision, group in summed.items():
        if len(group) > 1:
            of_all = sum(share[p.component] for p in group) / total
            label = f"{len(group)} others, together → {precision}  ({of_all:.1%})"
            rows.append(_row(label, group, raised, metric, summed=True))
    for probe in alone:
        ending = f" → {probe.precision}  ({share[probe.component] / total:.1%})"
        rows.append(_row(_short(probe.component, _LONGEST_LABEL) + ending, [probe], raised, metric))
    return rows


def _row(
    label: str,
    group: Sequence[Probe],
    raised: Mapping[tuple[str, str], Probe],
    metric: Metric,
    summed: bool = False,
) -> _Row:
    """Effects of log-perplexity add up; their errors are taken for independent."""
    increase, stderr = _summed(group, metric)
    back = [raised[p.component, p.precision] for p in group if (p.component, p.precision) in raised]
    if len(back) < len(group):
        return _Row(label, increase, stderr, None, 0.0, summed)
    back_increase, back_stderr = _summed(back, metric)
    return _Row(label, increase, stderr, -back_increase, back_stderr, summed)


def _summed(group: Sequence[Probe], metric: Metric) -> tuple[float, float]:
    """The sum of effects and its standard error, in percent of perplexity or the metric's own unit."""
    log_increase = min(_LARGEST_LOG, math.fsum(p.log_increase for p in group))
    log_stderr = math.hypot(*(p.log_stderr for p in group))
    percent, spread = 100 * math.expm1(log_increase), 100 * math.exp(log_increase) * log_stderr
    return metric.shown(percent), metric.spread(percent, spread)


def _draw_row(axes: Axes, y: int, row: _Row) -> None:
    axes.errorbar(row.increase, y + 0.14, xerr=1.96 * row.stderr, fmt="o", color=BLUE, markersize=5, capsize=2)
    if row.back is not None:
        axes.errorbar(row.back, y - 0.14, xerr=1.96 * row.back_stderr, fmt="s", color=ORANGE, markersize=4.5, capsize=2)


def _draw_sum(axes: Axes, y: int, row: _Row, unit: str) -> None:
    """Bars, cut off at the edge of the picture, with their figures."""
    axes.barh(y + 0.2, row.increase, height=0.34, color=BLUE, alpha=0.45)
    figures = f"{row.increase:+.3g} ± {1.96 * row.stderr:.2g} {unit}"
    if row.back is not None:
        axes.barh(y - 0.2, row.back, height=0.34, color=ORANGE, alpha=0.45)
        figures += f", {row.back:+.3g} ± {1.96 * row.back_stderr:.2g} {unit}"
    axes.text(
        0.99, y, figures, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip


def _short(name: str, most: int) -> str:
    """A name without its middle where it is too long."""
    if len(name) <= most:
        return name
    tail = most * 2 // 3
    return f"{name[: most - tail - 1]}…{name[-tail:]}"


def plot_allocation(components: Sequence[Component], precision_map: PrecisionMap, scheme: ActivationScheme) -> Figure:
    """The map as a grid, layers down and component kinds across, each cell with its precision and bytes."""
    held = precision_map.to_json()
    row_of, row_names = _layer_rows(components)
    columns = list(dict.fromkeys(component.kind for component in components))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        width, height = 1.5 + 0.95 * len(columns), 1.5 + 0.52 * len(row_names)
        figure = Figure(figsize=(min(_LARGEST, max(6.0, width)), min(_LARGEST, height)), layout="constrained")
        axes = figure.subplots()
        cells: dict[tuple[int, int], list[Component]] = {}
        column_of = {kind: column for column, kind in enumerate(columns)}
        for component in components:
            cells.setdefault((row_of[component.layer], column_of[component.kind]), []).append(component)
        for (row, column), group in cells.items():
            _cell(axes, row, column, group, held, scheme)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(row_names), 0)
        labels = [_short(kind, _LONGEST_LABEL // 2) for kind in columns]
        axes.set_xticks(np.arange(len(columns)) + 0.5, labels, rotation=30, ha="right")
        axes.set_yticks(np.arange(len(row_names)) + 0.5, row_names)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        stored = precision_map.bytes(components, scheme)
        full = sum(component.fp32_bytes for component in components)
        used = {name: colour for name, colour in precision_colours().items() if name in held.values()}
        handles = [Patch(facecolor=colour, edgecolor="white", label=name) for name, colour in used.items()]
        figure.legend(
            handles=handles, loc="outside lower right", ncols=min(len(handles), _MOST_IN_A_LINE), frameon=False
        )
        figure.suptitle(
            f"Precision and size of each component: {stored / 1e6:.2f} MB, {full / stored:.2f}× smaller than FP32",
            fontsize=10.5, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def allocation_png(components: Sequence[Component], precision_map: PrecisionMap, scheme: ActivationScheme) -> bytes:
    """The allocation picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    plot_allocation(components, precision_map, scheme).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _layer_rows(components: Sequence[Component]) -> tuple[dict[int | None, int], list[str]]:
    """The row of each layer and the rows' names: the model, then its layers, neighbours together in large models."""
    layers = sorted({component.layer for component in components if component.layer is not None})
    together = max(1, math.ceil(len(layers) / _MOST_LAYER_ROWS))
    row_of: dict[int | None, int] = {None: 0} | {layer: 1 + i // together for i, layer in enumerate(layers)}
    groups = [layers[i : i + together] for i in range(0, len(layers), together)]
    names = [f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]}–{group[-1]}" for group in groups]
    return row_of, ["model", *names]


def _cell(
    axes: Axes, row: int, column: int, group: Sequence[Component], held: Mapping[str, str], scheme: ActivationScheme
) -> None:
    """One cell, split into strips where several components (experts, layers) share it."""
    top, colours = row + 0.03, precision_colours()
    for precision, part in _strips([held[component.name] for component in group]):
        sides = (0.94, 0.94 * part)
        axes.add_patch(Rectangle((column + 0.03, top), *sides, facecolor=colours[precision], edgecolor="white"))
        top += 0.94 * part
    size = sum(component.bytes(held[component.name], scheme) for component in group)
    names = "/".join(sorted({held[component.name] for component in group}))
    style: Any = {"ha": "center", "va": "center", "fontsize": 8 if len(names) <= 12 else 6, "linespacing": 1.05}
    if "/" in names:  # edges of strips run through the text
        style["bbox"] = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.55}
    axes.text(column + 0.5, row + 0.5, f"{names}\n{_size(size)}", **style)


def _strips(precisions: Sequence[str]) -> list[tuple[str, float]]:
    """Precisions of a cell from its top and the parts of it that they take: one by one, or each precision's share."""
    if len(precisions) <= _MOST_STRIPS:
        return [(precision, 1 / len(precisions)) for precision in precisions]
    return [(precision, count / len(precisions)) for precision, count in sorted(Counter(precisions).items())]


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
