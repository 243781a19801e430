"""The words that a study is written in for what quantised means. Imports no torch, so reading is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

ActivationScheme = Literal["static", "dynamic", "none", "blocks"]
"""How the inputs of a quantised linear layer are: one scale from calibration, one a token, not quantised; or as
llama.cpp rounds them, to 8 bits in blocks of 32 (to float16 for a float16 weight)."""

ScaleMethod = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class ScaleRule:
    """How a scale is chosen: the largest magnitude, a percentile of the magnitudes, or the least square error.

    The percentile is the nearest rank within a row (for inputs, within all calibrated values): the default
    99.99 clips nothing in rows of fewer than 10 000 values.
    """

    method: ScaleMethod = "minmax"
    percentile: float = 99.99


@dataclass(frozen=True)
class Scheme:
    """What a quantised component means: how its inputs are quantised and how both kinds of scale are chosen."""

    activations: ActivationScheme = "static"
    weight_scales: ScaleRule = field(default_factory=ScaleRule)
    input_scales: ScaleRule = field(default_factory=ScaleRule)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scheme:
        """Inverse of `to_json`; raises KeyError or TypeError on foreign input."""
        rules = {key: ScaleRule(**values[key]) for key in ("weight_scales", "input_scales")}
        return cls(activations=values["activations"], **rules)
