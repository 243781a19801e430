"""Colours and type of a study's pictures."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from ssm_mp.precisions.registry import PRECISIONS

# Okabe & Ito (2008): told apart under every common colour blindness; marks differ in shape as well
BLUE, ORANGE, GREEN, RED, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999", "#000000"
_PRECISION_COLOURS = {
    "fp16": "#56B4E9", "int8": "#E69F00", "int6": RED, "int5": BLUE, "nf4": "#009E73", "int4": "#F0E442",
    "int3": "#CC79A7",
}  # fmt: skip
_OTHERS = ("#999933", "#AA4499", "#44AA99", "#882255", "#332288")  # Tol's (2021) muted ones
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E6E6E6", "axes.axisbelow": True, "svg.hashsalt": "ssm-mp", "savefig.dpi": 150,
}  # fmt: skip


def precision_colours() -> dict[str, str]:
    """The colour of every registered precision, in the order of the registry; those without one of their own take
    what is left, again from the first where they are many."""
    left = cycle(_OTHERS)
    return {name: _PRECISION_COLOURS.get(name) or next(left) for name in PRECISIONS}
