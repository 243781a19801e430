"""Predicted latency of a map: a table of each component's own time at each precision, and a rest.

    latency(map) = rest + Σ seconds(component, precision of the component in the map)

Latency is that of one prefill: a batch of prompts is read, and the logits of each one's last token are computed.
Components are timed where they stand: inside whole models that hold everything at one precision, so that each sees
its real inputs, and the caches as the other components leave them. The rest (scan, gates, residuals, the loop around
them) is what whole converted models take beyond the sum of their components: the median over both ends and a few
mixed maps. How well it adds up is measured in the same rounds, on other mixed maps, really converted.

Dimensions: `b` batch, `l` length.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssm_mp.conversion.convert import Converter
from ssm_mp.model import LanguageModel, Layer, Residual, assemble
from ssm_mp.precision_map import PrecisionMap

Choices = Mapping[str, Sequence[str]]
"""Component → the precisions that it can take, the widest first."""

_Key = tuple[str, str] | int
"""What a sample is of: a component at a precision, or the plain model of this number, 0 the FP32 model."""
_Run = Callable[[], Mapping[_Key, float]]
"""One prefill, and the samples that it gives, in seconds."""

_ENTRANCES = ("forward", "project", "tensor", "rows")
"""Methods by which a model enters a component's module."""
_ROUNDS, _FEWEST_ROUNDS, _WARM_UP = 101, 9, 2
MOST_ROUNDS = _ROUNDS + _WARM_UP
"""Rounds of a measurement that no time ends."""
_MOST_SECONDS = 60.0
"""Time after which no further round begins, once there are the fewest."""
_FITTED = 6
"""Mixed maps that the rest is fitted on, beside both ends: mixing precisions costs a little by itself."""
CHECKS = 8
"""Other maps, that the predictions are held against."""


@dataclass(frozen=True)
class Check:
    """One really converted map: what one prefill took, and what the table says, in seconds."""

    measured: float
    predicted: float


@dataclass(frozen=True)
class PredictionError:
    """Of the checks: median and largest of |predicted ÷ measured − 1|, and the rank correlation (Spearman)."""

    median: float
    worst: float
    spearman: float


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Latencies of one model on one machine, in seconds, whole nanoseconds each.

    fp32: of the FP32 model, whole; seconds: component → precision → its own time, the widest precision first.
    """

    batch: int
    length: int
    device: str
    threads: int
    rounds: int
    fp32: float
    rest: float
    seconds: Mapping[str, Mapping[str, float]]
    checks: tuple[Check, ...]

    def predict(self, chosen: Mapping[str, str]) -> float:
        """Latency of a map in seconds; a component that `chosen` does not name is at its widest."""
        held = (times[chosen.get(name, next(iter(times)))] for name, times in self.seconds.items())
        return round(self.rest + sum(held), 9)

    @property
    def reference(self) -> float:
        """Corner of a hypervolume: as far beyond the slowest map as that is behind the fastest."""
        slowest = self.rest + sum(max(times.values()) for times in self.seconds.values())
        spread = sum(max(times.values()) - min(times.values()) for times in self.seconds.values())
        return round(slowest + (round(spread, 9) or slowest), 9)

    @property
    def digest(self) -> str:
        """A short word for the times that predictions are made of."""
        return hashlib.sha256(json.dumps([self.rest, self.seconds]).encode()).hexdigest()[:16]

    @property
    def error(self) -> PredictionError:
        """How well the predictions hold."""
        measured, predicted = (np.array([getattr(c, name) for c in self.checks]) for name in ("measured", "predicted"))
        relative = np.abs(predicted / measured - 1)
        ranks = [values.argsort().argsort() for values in (measured, predicted)]
        return PredictionError(
            float(np.median(relative)), float(relative.max()), float(np.corrcoef(ranks[0], ranks[1])[0, 1])
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "error": asdict(self.error)}


def table_from_json(values: Mapping[str, Any]) -> LatencyTable:
    """Inverse of `LatencyTable.to_json`. Raises KeyError or TypeError for other values."""
    fields = {name: value for name, value in values.items() if name != "error"}
    return LatencyTable(**{**fields, "checks": tuple(Check(**check) for check in values["checks"])})


class _Clock:
    """Marks moments of the device's own time; intervals are read when a run is over."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """This moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: Any, ended: Any) -> float:
        """Seconds between two moments that are over."""
        if not self._cuda:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


class _Stopwatch:
    """Time spent in each component while a model of timed modules runs."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._intervals: list[tuple[str, Any, Any]] = []
        self._inside = False
        self._told: dict[str, float] = defaultdict(float)

    def timed(self, name: str, module: nn.Module) -> nn.Module:
        """A twin of a component's module that shares its tensors and whose entrances are timed."""
        twin = copy.copy(module)
        for entrance in _ENTRANCES:
            if hasattr(module, entrance):
                setattr(twin, entrance, self._timing(name, getattr(twin, entrance)))
        return twin

    def _timing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one entrance may use another
                return call(*args, **kwargs)
            self._inside = True
            began = self._clock.mark()
            try:
                return call(*args, **kwargs)
            finally:
                self._intervals.append((name, began, self._clock.mark()))
                self._inside = False

        return timed

    def add(self, names: Mapping[nn.Module, str], seconds: Mapping[nn.Module, float]) -> None:
        """A branch that ran as one call tells the seconds spent in each of its components."""
        for module, spent in seconds.items():
            self._told[names[module]] += spent

    def read(self) -> dict[str, float]:
        """Seconds in each component since the last reading."""
        spent, self._told = self._told, defaultdict(float)
        for name, began, ended in self._intervals:
            spent[name] += self._clock.between(began, ended)
        self._intervals = []
        return spent


def prefill(model: LanguageModel, ids: Tensor) -> Tensor:
    """Read prompts `ids [b, l]` and give the logits of each one's last token, `[b, 1, V]`."""
    return model.head(model.hidden(ids)[:, -1:])


def measure_latency(
    converter: Converter,
    choices: Choices,
    ids: Tensor,
    *,
    checks: int = CHECKS,
    rounds: int = _ROUNDS,
    seed: int = 0,
    before_round: Callable[[], None] | None = None,
) -> LatencyTable:
    """Time every component at every precision that it can take, on prefills of `ids [b, l]`.

    All models run in turn, round after round, and medians are taken, so that what disturbs the machine for a while
    disturbs all alike; on a machine that is busy with other things the times are still worth little, which the checks
    then show. before_round: called before each round; what it raises ends the measurement.
    """
    device = converter.model.device
    rng, ids = np.random.default_rng(seed), ids.to(device)
    maps = [_extreme(choices, end) for end in (0, -1)] + _mixed(choices, _FITTED, rng) + _mixed(choices, checks, rng)
    runs = _timed_runs(converter, choices, ids) + _plain_runs(converter, maps, ids)
    samples: dict[_Key, list[float]] = defaultdict(list)
    done, began = -_WARM_UP, time.monotonic()
    with torch.inference_mode():
        while done < rounds and (done < _FEWEST_ROUNDS or time.monotonic() - began < _MOST_SECONDS):
            if before_round is not None:
                before_round()
            for i in rng.permutation(len(runs)):  # or each would always find the caches as the same one leaves them
                for key, seconds in runs[i]().items():
                    samples[key].append(seconds)
            done += 1
            if done == 0:
                samples.clear()
    return _table(choices, samples, maps, ids, done)


def _timed_runs(converter: Converter, choices: Choices, ids: Tensor) -> list[_Run]:
    """Runs that time components, one for each precision."""
    watch = _Stopwatch(_Clock(ids.device))

    def one(held: Mapping[str, str], model: LanguageModel) -> Mapping[_Key, float]:
        prefill(model, ids)
        return {(name, held[name]): seconds for name, seconds in watch.read().items()}

    found: list[_Run] = []
    for precision in dict.fromkeys(p for held in choices.values() for p in held):
        held = {name: precision if precision in able else able[0] for name, able in choices.items()}
        found.append(functools.partial(one, held, _timed_model(converter, held, watch)))
    return found


def _plain_runs(converter: Converter, maps: Sequence[PrecisionMap], ids: Tensor) -> list[_Run]:
    """Runs that time whole models: the FP32 model, then those of the maps."""
    clock = _Clock(ids.device)

    def one(number: int, model: LanguageModel) -> Mapping[_Key, float]:
        began = clock.mark()
        prefill(model, ids)
        return {number: clock.between(began, clock.mark())}

    models = [converter.model, *(converter.convert(held) for held in maps)]
    return [functools.partial(one, number, model) for number, model in enumerate(models)]


def _table(
    choices: Choices,
    samples: Mapping[_Key, Sequence[float]],
    maps: Sequence[PrecisionMap],
    ids: Tensor,
    rounds: int,
) -> LatencyTable:
    """The table of all medians. maps: those that the rest is fitted on, then the checks."""
    # a component that never ran, such as an expert that no token reached, takes no time
    seconds = {c: {p: _nanoseconds(samples.get((c, p), [0.0])) for p in held} for c, held in choices.items()}
    totals = [_nanoseconds(samples[number]) for number in range(1, 1 + len(maps))]
    sums = [sum(seconds[name][precision] for name, precision in held) for held in maps]
    beyond = [total - known for total, known in zip(totals, sums, strict=True)]
    fitted = 2 + _FITTED
    rest = round(statistics.median(beyond[:fitted]), 9)
    pairs = zip(totals[fitted:], sums[fitted:], strict=True)
    return LatencyTable(
        batch=ids.shape[0],
        length=ids.shape[1],
        device=str(ids.device),
        threads=torch.get_num_threads(),
        rounds=rounds,
        fp32=_nanoseconds(samples[0]),
        rest=rest,
        seconds=seconds,
        checks=tuple(Check(total, round(rest + known, 9)) for total, known in pairs),
    )


def _nanoseconds(spent: Sequence[float]) -> float:
    """The median, in seconds, to the nanosecond: sums of such are the same in every order."""
    return round(statistics.median(spent), 9)


def _timed_model(converter: Converter, held: Mapping[str, str], watch: _Stopwatch) -> LanguageModel:
    modules = {c.name: watch.timed(c.name, converter.module(c, held[c.name])) for c in converter.components}
    model = assemble(converter.model.config, modules)
    names = {module: name for name, module in modules.items()}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for residual in layer.branches:
            assert isinstance(residual, Residual)
            residual.observer = functools.partial(watch.add, names)
    return model


def _extreme(choices: Choices, end: int) -> PrecisionMap:
    """Every component at its widest (0) or its narrowest (−1) choice."""
    return PrecisionMap(tuple((name, held[end]) for name, held in choices.items()))


def _mixed(choices: Choices, count: int, rng: np.random.Generator) -> list[PrecisionMap]:
    """Maps at random, the first near the widest and the last near the narrowest."""
    found = []
    for chance in np.linspace(0.1, 0.9, count):
        lowered = {name: held[1:] for name, held in choices.items() if len(held) > 1}
        chosen = {name: str(rng.choice(held)) for name, held in lowered.items() if rng.random() < chance}
        found.append(PrecisionMap(tuple((name, chosen.get(name, held[0])) for name, held in choices.items())))
    return found
