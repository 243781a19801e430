"""The three pictures of a study: Pareto front, sensitivities, the winner's allocation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from search.front import Point, fastest, front_by_size, pareto_front
from search.probe import LOWEST, Probe
from ssm_mp.components import Component
from ssm_mp.errors import MachineError
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme

# Okabe & Ito (2008): told apart under every common colour blindness; marks differ in shape as well
BLUE, ORANGE, GREEN, RED, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999", "#000000"
PRECISION_COLOURS = {"fp16": "#56B4E9", "int8": "#E69F00", "nf4": "#009E73", "int4": "#F0E442", "int3": "#CC79A7"}
_NAMED = {
    "uniform fp16": ("s", GREEN),
    "conservative": ("^", ORANGE),
    "aggressive": ("v", RED),
    "uniform int8": ("D", "#CC79A7"),
    "cumulative": ("P", "#56B4E9"),
}
_STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E6E6E6", "axes.axisbelow": True, "svg.hashsalt": "ssm-mp", "savefig.dpi": 150,
}  # fmt: skip


def plot_front(
    points: Sequence[Point], budget_percent: float, winner: int | None, certified: str, baseline_bytes: int
) -> Figure:
    """Perplexity increase against compression: all trials, the front, the named maps, the budget and the winner.

    Where the budget is far above every trial, it is drawn in a strip of its own over a broken axis. Where latency is
    known, the front is coloured by it, and its line joins what is on it for size and quality alone.
    certified: a sentence about the winner's certificate, for the title.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        shown = _shown(points, budget_percent)
        tops = [p.increase_percent + 2 * p.stderr_percent for p in shown] or [budget_percent]
        bottoms = [p.increase_percent - 2 * p.stderr_percent for p in shown] or [0.0]
        high, low = max(tops), min(0.0, *bottoms)
        broken = high < 0.6 * budget_percent
        if broken:
            strip, axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 7], "hspace": 0.02})
            _budget_strip(strip, axes, budget_percent)
        else:
            axes = figure.subplots()
            axes.axhline(
                budget_percent, color=RED, linestyle="--", linewidth=1.3, label=f"budget, +{budget_percent:g} %"
            )
            high = max(high, budget_percent)
        margin = 0.12 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)
        _draw_points(axes, points, shown, budget_percent, winner)
        axes.set_xlabel("compression over FP32 (×), larger is smaller on disk")
        axes.set_ylabel("perplexity increase over FP32 (%), lower is better")
        above = len(points) - len(shown)
        note = f"; {above} worse {'trial' if above == 1 else 'trials'} above the picture" if above else ""
        title = f"{len(points)} precision maps tried; FP32 is {baseline_bytes / 1e6:.2f} MB{note}\n{certified}"
        figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
        _legend(axes, shown, broken, budget_percent)
    return figure


def _shown(points: Sequence[Point], budget_percent: float) -> list[Point]:
    """The trials that fit a picture in which the budget still matters."""
    return [point for point in points if point.increase_percent <= 3 * budget_percent]


def _budget_strip(strip: Axes, axes: Axes, budget_percent: float) -> None:
    """The budget line above a break in the vertical axis."""
    strip.axhline(budget_percent, color=RED, linestyle="--", linewidth=1.3)
    strip.set_ylim(budget_percent * 0.93, budget_percent * 1.07)
    strip.set_yticks([budget_percent])
    strip.spines["bottom"].set_visible(False)
    strip.tick_params(bottom=False)
    strip.grid(visible=False)
    strip.text(
        0.99, 0.62, f"budget, +{budget_percent:g} %", transform=strip.transAxes, ha="right", color=RED, fontsize=9
    )
    slash: Any = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": BLACK,
        "clip_on": False,
    }
    strip.plot([0], [0], transform=strip.transAxes, **slash)
    axes.plot([0], [1], transform=axes.transAxes, **slash)


def _draw_points(
    axes: Axes, points: Sequence[Point], shown: Sequence[Point], budget_percent: float, winner: int | None
) -> None:
    front = pareto_front(points, budget_percent)
    on_front = {point.trial for point in front}
    others = [point for point in shown if point.trial not in on_front and point.stopped is None]
    stopped = [point for point in shown if point.stopped is not None]
    axes.scatter(
        [p.compression for p in stopped], [p.increase_percent for p in stopped], s=14, color=GREY, marker="x",
        alpha=0.65, linewidths=0.8,
    )  # fmt: skip
    axes.scatter(
        [p.compression for p in others],
        [p.increase_percent for p in others],
        s=16,
        color=GREY,
        alpha=0.65,
        linewidths=0,
    )
    line = front_by_size(front)
    axes.plot(
        [p.compression for p in line], [p.increase_percent for p in line],
        color=BLUE, linewidth=1.2, drawstyle="steps-post", alpha=0.6,
    )  # fmt: skip
    axes.errorbar(
        [p.compression for p in front], [p.increase_percent for p in front],
        yerr=[1.96 * p.stderr_percent for p in front], fmt="o", color=BLUE, markersize=5, capsize=2.5, elinewidth=1,
    )  # fmt: skip
    _colour_by_latency(axes, front)
    for point in shown:
        if point.origin in _NAMED:
            marker, colour = _NAMED[point.origin]
            axes.plot(
                point.compression, point.increase_percent, marker, color=colour, markersize=9, markeredgecolor=BLACK,
                markeredgewidth=0.7, zorder=5,
            )  # fmt: skip
    chosen = next((point for point in points if point.trial == winner), None)
    if chosen is not None:
        _label_winner(axes, chosen, shown)


def _colour_by_latency(axes: Axes, front: Sequence[Point]) -> None:
    """The front's points in the colour of their latency, with its scale, and a ring around the fastest."""
    quickest = fastest(front)
    if quickest is None:
        return
    shades = axes.scatter(
        [p.compression for p in front], [p.increase_percent for p in front],
        c=[1e3 * p.latency for p in front if p.latency is not None], cmap="cividis", s=46, edgecolors=BLACK,
        linewidths=0.6, zorder=4,
    )  # fmt: skip
    figure = axes.figure
    figure.colorbar(shades, ax=figure.axes, label="predicted latency of a prefill (ms), lower is better", pad=0.015)
    axes.plot(
        quickest.compression, quickest.increase_percent, "s", markersize=12, markerfacecolor="none",
        markeredgecolor=RED, markeredgewidth=1.5, zorder=6,
    )  # fmt: skip


def _label_winner(axes: Axes, point: Point, shown: Sequence[Point]) -> None:
    axes.plot(
        point.compression, point.increase_percent, "o", markersize=15, markerfacecolor="none",
        markeredgecolor=BLACK, markeredgewidth=1.6, zorder=6,
    )  # fmt: skip
    axes.annotate(
        f"winner: trial {point.trial}\n{point.compression:.2f}×, {point.bytes / 1e6:.2f} MB, "
        f"{point.increase_percent:+.2f} ± {1.96 * point.stderr_percent:.2f} %"
        + ("" if point.latency is None else f"\n{1e3 * point.latency:.2f} ms"),
        (point.compression, point.increase_percent),
        xytext=_empty_place(axes, shown), textcoords="axes fraction",
        ha="center", va="center", fontsize=9.5, zorder=7,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": BLACK, "linewidth": 0.8},
        arrowprops={"arrowstyle": "-", "color": BLACK, "linewidth": 0.8},
    )  # fmt: skip


def _empty_place(axes: Axes, shown: Sequence[Point]) -> tuple[float, float]:
    """The place for a label, in fractions of the axes, whose box covers the fewest points; the legend is top left."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across = np.array([(point.compression - left) / (right - left) for point in shown])
    up = np.array([(point.increase_percent - bottom) / (top - bottom) for point in shown])

    def covered(place: tuple[float, float]) -> int:
        return int(((np.abs(across - place[0]) < 0.2) & (np.abs(up - place[1]) < 0.12)).sum())

    return min(
        ((x, y) for y in (0.88, 0.65, 0.45, 0.25) for x in (0.6, 0.78, 0.45, 0.22) if x > 0.4 or y < 0.4), key=covered
    )


def _legend(axes: Axes, shown: Sequence[Point], broken: bool, budget_percent: float) -> None:
    origins = {point.origin for point in shown}
    stopped = Line2D([], [], marker="x", color=GREY, linestyle="none", markersize=4, label="stopped early")
    quickest = Line2D(
        [], [], marker="s", markerfacecolor="none", markeredgecolor=RED, linestyle="none", label="fastest of the front"
    )
    handles = [
        Line2D([], [], marker="o", color=BLUE, markersize=5, label="Pareto front, 95 % interval"),
        *([quickest] if any(point.latency is not None for point in shown) else []),
        Line2D([], [], marker="o", color=GREY, linestyle="none", markersize=4, label="other trials"),
        *([stopped] if any(point.stopped for point in shown) else []),
        *(
            Line2D([], [], marker=marker, color=colour, linestyle="none", markeredgecolor=BLACK, label=name)
            for name, (marker, colour) in _NAMED.items()
            if name in origins
        ),
        Line2D(
            [],
            [],
            color=RED,
            linestyle="--",
            label=f"budget, +{budget_percent:g} %{' (axis broken)' if broken else ''}",
        ),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)


def plot_sensitivities(probes: Sequence[Probe], components: Sequence[Component]) -> Figure:
    """Perplexity cost of lowering each component, measured from both ends, the costliest on top."""
    share = {component.name: component.count for component in components}
    total = sum(share.values())
    lowered = [p for p in probes if p.end != LOWEST]
    raised = {(p.component, p.origin): p for p in probes if p.end == LOWEST}
    rows = sorted(lowered, key=lambda p: p.log_increase)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 1.6 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, probe in enumerate(rows):
            values = probe.to_json()
            axes.errorbar(
                values["increase_percent"], y + 0.14, xerr=1.96 * values["stderr_percent"], fmt="o", color=BLUE,
                markersize=5, capsize=2,
            )  # fmt: skip
            other = raised.get((probe.component, probe.precision))
            if other is not None:
                back = other.to_json()
                axes.errorbar(
                    -back["increase_percent"], y - 0.14, xerr=1.96 * back["stderr_percent"], fmt="s", color=ORANGE,
                    markersize=4.5, capsize=2,
                )  # fmt: skip
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.set_yticks(
            range(len(rows)),
            [f"{p.component} → {p.precision}  ({share[p.component] / total:.1%})" for p in rows],
            fontsize=8.5,
        )
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("perplexity cost of the lower precision (%), 95 % interval")
        figure.suptitle(
            "What each component costs at lower precision (in brackets: its share of the parameters)",
            fontsize=10.5,
            x=0.01,
            ha="left",
        )
        handles = [
            Line2D([], [], marker="o", color=BLUE, linestyle="none", label="lowered alone, others at their widest"),
            Line2D([], [], marker="s", color=ORANGE, linestyle="none", label="low over raised, others at their lowest"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def plot_allocation(components: Sequence[Component], precision_map: PrecisionMap, scheme: ActivationScheme) -> Figure:
    """The map as a grid, layers down and component kinds across, each cell with its precision and bytes."""
    held = precision_map.to_json()
    rows, columns = _grid(components)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        width, height = 1.5 + 0.95 * len(columns), 1.5 + 0.52 * len(rows)
        figure = Figure(figsize=(max(6.0, width), height), layout="constrained")
        axes = figure.subplots()
        cells: dict[tuple[int, int], list[Component]] = {}
        for component in components:
            cells.setdefault((rows.index(component.layer), columns.index(component.kind)), []).append(component)
        for (row, column), group in cells.items():
            _cell(axes, row, column, group, held, scheme)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30, ha="right")
        axes.set_yticks(np.arange(len(rows)) + 0.5, ["model" if row is None else f"layer {row}" for row in rows])
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        stored = precision_map.bytes(components, scheme)
        full = sum(component.fp32_bytes for component in components)
        used = [name for name in PRECISION_COLOURS if name in held.values()]
        handles = [Patch(facecolor=PRECISION_COLOURS[name], edgecolor="white", label=name) for name in used]
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False)
        figure.suptitle(
            f"Precision and size of each component: {stored / 1e6:.2f} MB, {full / stored:.2f}× smaller than FP32",
            fontsize=10.5, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _grid(components: Sequence[Component]) -> tuple[list[int | None], list[str]]:
    """Rows (the model, then its layers) and columns (kinds in the order of the data flow)."""
    rows: list[int | None] = [None]
    rows += sorted({component.layer for component in components if component.layer is not None})
    return rows, list(dict.fromkeys(component.kind for component in components))


def _cell(
    axes: Axes, row: int, column: int, group: Sequence[Component], held: Mapping[str, str], scheme: ActivationScheme
) -> None:
    """One cell, split into strips where several components (experts) share it."""
    for i, component in enumerate(group):
        colour = PRECISION_COLOURS.get(held[component.name], GREY)
        height = 0.94 / len(group)
        axes.add_patch(
            Rectangle((column + 0.03, row + 0.03 + i * height), 0.94, height, facecolor=colour, edgecolor="white")
        )
    size = sum(component.bytes(held[component.name], scheme) for component in group)
    names = sorted({held[component.name] for component in group})
    axes.text(
        column + 0.5,
        row + 0.5,
        f"{'/'.join(names)}\n{_size(size)}",
        ha="center",
        va="center",
        fontsize=8,
        linespacing=1.05,
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def allocation_png(components: Sequence[Component], precision_map: PrecisionMap, scheme: ActivationScheme) -> bytes:
    """The allocation picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    plot_allocation(components, precision_map, scheme).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        partial = path.with_name(f".partial-{path.name}")
        try:
            figure.savefig(partial, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise MachineError(f"{path}: cannot be written ({error})") from None
    return paths
