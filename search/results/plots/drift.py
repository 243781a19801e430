"""The picture of a drift: perplexity increase by position in the window, with error bars."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.results.plots.style import BLACK, BLUE, GREY, RED
from ssm_mp.evaluation.drift import Drift


def plot_drift(name: str, found: Drift, long: Drift | None) -> Figure:
    """A panel for the study's windows, and one for longer ones where they were measured."""
    panels = [found] if long is None else [found, long]
    figure = Figure(figsize=(7.0 if long is None else 11.0, 4.2), layout="constrained")
    for axes, shown in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _panel(axes, shown)
        if shown is long:
            axes.axvline(found.length, color=RED, linestyle=":", linewidth=1.3, label="end of the study's windows")
        axes.legend(frameon=False, fontsize=9)
    axes = figure.axes[0]
    axes.set_ylabel("perplexity increase over FP32 (%)")
    figure.suptitle(f"Error by position in the window: {name}", fontsize=10.5, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, shown: Drift) -> None:
    middles = [(bucket.first + bucket.last) / 2 for bucket in shown.buckets]
    halves = [(bucket.last - bucket.first) / 2 for bucket in shown.buckets]
    increases = [bucket.increase.percent for bucket in shown.buckets]
    errors = [1.96 * bucket.increase.stderr_percent for bucket in shown.buckets]
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.axhline(
        shown.whole.percent,
        color=GREY,
        linestyle="--",
        linewidth=1.2,
        label=f"all positions, {shown.whole.percent:+.3f} %",
    )
    axes.errorbar(
        middles, increases, xerr=halves, yerr=errors, fmt="o", color=BLUE, markersize=5, capsize=3, linewidth=1.3,
        label="by position, ± 95 %",
    )  # fmt: skip
    axes.set_xlabel("position of the predicted token")
    axes.set_title(f"{shown.fp32.windows} windows of {shown.length} tokens", fontsize=10)
    axes.grid(color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
