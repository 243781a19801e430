"""The picture of a search: its Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from search.base.front import Point, fastest, front_by_size, pareto_front
from search.base.metric import PERPLEXITY, Metric
from search.results.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLE

_NAMED = {
    "uniform fp16": ("s", GREEN),
    "conservative": ("^", ORANGE),
    "aggressive": ("v", RED),
    "uniform int8": ("D", "#CC79A7"),
    "cumulative": ("P", "#56B4E9"),
}

_LEGEND_COLUMNS = 4


def plot_front(
    points: Sequence[Point],
    budget_percent: float,
    winner: int | None,
    certified: str,
    baseline_bytes: int,
    target: str | None = None,
    metric: Metric = PERPLEXITY,
) -> Figure:
    """The metric's increase against compression: all trials, the front, the named maps, the budget and the winner.

    Where the budget is far above every trial, it is drawn in a strip of its own over a broken axis. Where latency is
    known, the front is coloured by it, and its line joins what is on it for size and quality alone.
    certified: a sentence about the winner's certificate, for the title. target: the format whose files these are.
    """
    points, budget = [_drawn(point, metric) for point in points], metric.shown(budget_percent)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.8), layout="constrained")
        shown = _shown(points, budget)
        tops = [p.increase_percent + 2 * p.stderr_percent for p in shown] or [budget]
        bottoms = [p.increase_percent - 2 * p.stderr_percent for p in shown] or [0.0]
        high, low = max(tops), min(0.0, *bottoms)
        broken = high < 0.6 * budget
        if broken:
            strip, axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 7], "hspace": 0.02})
            _budget_strip(strip, axes, budget, metric)
        else:
            axes = figure.subplots()
            axes.axhline(budget, color=RED, linestyle="--", linewidth=1.3)
            high = max(high, budget)
        margin = 0.12 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)
        _draw_points(axes, points, shown, budget, winner, metric)
        file = "" if target is None else f" as {target}"
        axes.set_xlabel(f"compression over FP32 (×), larger is smaller on disk{file}")
        axes.set_ylabel(f"{metric.axis}, lower is better")
        above = len(points) - len(shown)
        note = f"; {above} worse {'trial' if above == 1 else 'trials'} above the picture" if above else ""
        title = f"{len(points)} precision maps tried; FP32 is {baseline_bytes / 1e6:.2f} MB{note}\n{certified}"
        figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
        _legend(figure, shown, broken, _budget(budget, metric))
    return figure


def _budget(budget: float, metric: Metric) -> str:
    return f"budget, +{budget:g} {metric.unit}"


def _drawn(point: Point, metric: Metric) -> Point:
    """A point whose increase and error are in the metric's unit."""
    spread = metric.spread(point.increase_percent, point.stderr_percent)
    return replace(point, increase_percent=metric.shown(point.increase_percent), stderr_percent=spread)


def _shown(points: Sequence[Point], budget: float) -> list[Point]:
    """The trials that fit a picture in which the budget still matters."""
    return [point for point in points if point.increase_percent <= 3 * budget]


def _budget_strip(strip: Axes, axes: Axes, budget: float, metric: Metric) -> None:
    """The budget line above a break in the vertical axis."""
    strip.axhline(budget, color=RED, linestyle="--", linewidth=1.3)
    strip.set_ylim(budget * 0.93, budget * 1.07)
    strip.set_yticks([budget])
    strip.spines["bottom"].set_visible(False)
    strip.tick_params(bottom=False)
    strip.grid(visible=False)
    strip.text(0.99, 0.62, _budget(budget, metric), transform=strip.transAxes, ha="right", color=RED, fontsize=9)
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
    axes: Axes, points: Sequence[Point], shown: Sequence[Point], budget: float, winner: int | None, metric: Metric
) -> None:
    front = pareto_front(points, budget)
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
        _label_winner(axes, chosen, shown, metric)


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


def _label_winner(axes: Axes, point: Point, shown: Sequence[Point], metric: Metric) -> None:
    digits = 2 + metric.digits
    axes.plot(
        point.compression, point.increase_percent, "o", markersize=15, markerfacecolor="none",
        markeredgecolor=BLACK, markeredgewidth=1.6, zorder=6,
    )  # fmt: skip
    axes.annotate(
        f"winner: trial {point.trial}\n{point.compression:.2f}×, {point.bytes / 1e6:.2f} MB, "
        f"{point.increase_percent:+.{digits}f} ± {1.96 * point.stderr_percent:.{digits}f} {metric.unit}"
        + ("" if point.latency is None else f"\n{1e3 * point.latency:.2f} ms"),
        (point.compression, point.increase_percent),
        xytext=_empty_place(axes, shown), textcoords="axes fraction",
        ha="center", va="center", fontsize=9.5, zorder=7,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": BLACK, "linewidth": 0.8},
        arrowprops={"arrowstyle": "-", "color": BLACK, "linewidth": 0.8},
    )  # fmt: skip


def _empty_place(axes: Axes, shown: Sequence[Point]) -> tuple[float, float]:
    """The place for a label, in fractions of the axes, whose box covers the fewest points."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across = np.array([(point.compression - left) / (right - left) for point in shown])
    up = np.array([(point.increase_percent - bottom) / (top - bottom) for point in shown])

    def covered(place: tuple[float, float]) -> int:
        return int(((np.abs(across - place[0]) < 0.2) & (np.abs(up - place[1]) < 0.12)).sum())

    return min(((x, y) for y in (0.88, 0.65, 0.45, 0.25) for x in (0.6, 0.78, 0.45, 0.22)), key=covered)


def _legend(figure: Figure, shown: Sequence[Point], broken: bool, budget: str) -> None:
    """What the signs mean, below the axes: within them any place may be some search's points'."""
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
            label=f"{budget}{' (axis broken)' if broken else ''}",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9)
