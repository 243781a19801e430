"""What maps are judged by, and how a figure of it is shown.

A rise of `x` nats a token is held as exp(x) − 1 in percent by whatever compares maps (`increase_percent`), with either
metric, so that trials, fronts and certificates know one scale. Of log-perplexity that is the rise of perplexity. Of the
divergence it is that as well, on text whose every next token was drawn as FP32 predicts it: KL(FP32 ‖ map) is the mean
of log p(FP32) − log p(map) over such tokens. People read it in nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Word = Literal["perplexity", "kl"]

_PERCENT = "_percent"


@dataclass(frozen=True)
class Metric:
    """A metric: its word in study files, what rises, and the unit in which that is shown with so many digits more.

    head, axis: of a table's column, of a picture. ending: of names in answers.
    """

    word: Word
    rises: str
    unit: str
    head: str
    axis: str
    ending: str
    digits: int

    def shown(self, percent: float) -> float:
        """A figure that is held in percent, in this metric's unit."""
        if self.ending == _PERCENT:
            return percent
        return math.log1p(percent / 100) if percent > -100 else -math.inf

    def held(self, shown: float) -> float:
        """Inverse of `shown`; infinite where no float can hold it."""
        if self.ending == _PERCENT:
            return shown
        return 100 * math.expm1(shown) if shown <= 700 else math.inf

    def spread(self, percent: float, stderr_percent: float) -> float:
        """The standard error of a figure, to first order, in this metric's unit."""
        return stderr_percent if self.ending == _PERCENT else stderr_percent / (100 + percent)

    def said(self, percent: float, digits: int, sign: str = "+") -> str:
        """A figure with its unit, in the digits that a percentage would have."""
        return f"{self.shown(percent):{sign}.{digits + self.digits}f} {self.unit}"

    def interval(self, percent: float, stderr_percent: float, digits: int) -> str:
        """A figure with its 95 % interval, without the unit."""
        digits += self.digits
        spread = 1.96 * self.spread(percent, stderr_percent)
        return f"{self.shown(percent):+.{digits}f} ± {spread:.{digits}f}"

    def said_log(self, nats: float, digits: int, sign: str = "+") -> str:
        """A small difference of logarithms, nats a token, likewise."""
        return f"{100 * nats if self.ending == _PERCENT else nats:{sign}.{digits + self.digits}f} {self.unit}"

    def budget(self, percent: float) -> str:
        """A budget with its unit."""
        return f"{self.shown(percent):g} {self.unit}"

    def key(self, name: str) -> str:
        """What the figure `name`, such as `increase`, is called in answers."""
        return name + self.ending

    def answer(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values as the command line answers: those in percent in this metric's unit and under its name."""
        if self.ending == _PERCENT:
            return dict(values)
        return {self._renamed(name): self._converted(name, value, values) for name, value in values.items()}

    def _renamed(self, name: str) -> str:
        return name.removesuffix(_PERCENT) + self.ending if name.endswith(_PERCENT) else name

    def _converted(self, name: str, value: Any, values: Mapping[str, Any]) -> Any:
        """A value of an answer; one in percent that is None, for +∞, stays so."""
        if isinstance(value, Mapping):
            return self.answer(value)
        if name.endswith(_PERCENT):
            if isinstance(value, list | tuple):
                return [self._converted(name, one, values) for one in value]
            if value is None:
                return None
            return self.spread(values["increase_percent"], value) if name == "stderr_percent" else self.shown(value)
        if isinstance(value, list | tuple):
            return [self._converted("", one, {}) for one in value]
        return value


PERPLEXITY = Metric("perplexity", "perplexity", "%", "increase %", "perplexity increase over FP32 (%)", _PERCENT, 0)
KL = Metric("kl", "KL to FP32", "nats", "KL, nats", "KL to FP32 (nats a token)", "_nats", 2)
METRICS: Mapping[str, Metric] = {"perplexity": PERPLEXITY, "kl": KL}
"""The metrics that a study may name."""
