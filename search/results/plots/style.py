"""Colours and type of a study's pictures."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from ssm_mp.precisions.registry import PRECISIONS

# Okabe & Ito (2008): told apart under every common colour blindness; marks differ in shape as well
BLUE, ORANGE, GREEN, RED, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999", "#000000"
_PRECISION_COLOURS = {
    "fp16": "#56B4E9", "int8": "#E69F00", "int6": RED, "int5": BLUE, "nf4": "#009E73", "int4": "#F0E442",
    "int3": "#CC79A7", "nf3": "#882255", "nf2": "#332288",
}  # fmt: skip
_SHADES = {"g32": (BLACK, 0.35), "g128": ("#FFFFFF", 0.5)}
"""What the colour of a book is mixed with, and how much of it, for groups of another size."""
_OTHERS = ("#999933", "#AA4499", "#44AA99", "#DDCC77", "#661100")  # Tol's (2021) muted ones
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E6E6E6", "axes.axisbelow": True, "svg.hashsalt": "ssm-mp", "savefig.dpi": 150,
}  # fmt: skip


def precision_colours() -> dict[str, str]:
    """The colour of every registered precision, in the order of the registry; groups of other sizes have the hue of
    their book, shorter ones darker and longer ones lighter. Those without a colour of their own take what is left,
    again from the first where they are many."""
    left = cycle(_OTHERS)
    return {name: _own_colour(name) or next(left) for name in PRECISIONS}


def _own_colour(name: str) -> str | None:
    """The colour that a name has whatever else is registered; None where it has none."""
    for ending, (other, share) in _SHADES.items():
        book = _PRECISION_COLOURS.get(name.removesuffix(ending))
        if name.endswith(ending) and book is not None:
            return _mixed(book, other, share)
    return _PRECISION_COLOURS.get(name)


def _mixed(colour: str, other: str, share: float) -> str:
    """A colour with a share of another, both as `#rrggbb`."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(one + share * (two - one)) for one, two in pairs).hex().upper()
