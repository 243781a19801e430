"""The table of latencies: what is timed, how it adds up, and that timing changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from ssm_mp.components import find_components
from ssm_mp.config import Config
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.evaluation import latency
from ssm_mp.evaluation.latency import Check, LatencyTable, measure_latency, prefill, table_from_json
from ssm_mp.model import Residual, assemble
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, MAMBA, random_model, some_windows

PRECISIONS = ("fp16", "int8", "nf4")


def converter_of(config: Config) -> Converter:
    model = random_model(config)
    return Converter(model, Scheme(), calibrate(model, some_windows()))


def choices_of(converter: Converter) -> dict[str, tuple[str, ...]]:
    """Everything but `A_log` and `D` may take every precision that it fits."""
    return {
        c.name: tuple(p for p in PRECISIONS if converter.infeasible(c, p) is None) if c.pin != "always" else ("fp16",)
        for c in converter.components
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_component_is_timed_at_every_precision_that_it_can_take(name: str) -> None:
    converter = converter_of(CONFIGS[name])
    choices = choices_of(converter)
    table = measure_latency(converter, choices, some_windows().ids[:2], checks=3, rounds=2)
    assert {c: tuple(times) for c, times in table.seconds.items()} == choices
    assert (table.batch, table.length, table.rounds, len(table.checks)) == (2, 16, 2, 3)
    # an expert may get no token, and bare values and convolutions are unpacked before the rounds
    reached = [c.name for c in converter.components if c.multiplies_inputs and "experts" not in c.name]
    assert all(seconds > 0 for c in reached for seconds in table.seconds[c].values())
    assert table.fp32 > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_timed_twins_computes_the_same_and_leaves_the_modules_as_they_are(name: str) -> None:
    converter = converter_of(CONFIGS[name])
    ids = some_windows().ids[:2]
    held = {c.name: "fp16" if c.pin == "always" else "int8" for c in converter.components}
    held = {
        c.name: held[c.name] if converter.infeasible(c, held[c.name]) is None else "fp16" for c in converter.components
    }
    modules = {c.name: converter.module(c, held[c.name]) for c in converter.components}
    attributes = {key: set(vars(module)) for key, module in modules.items()}
    watch = latency._Stopwatch(latency._Clock(torch.device("cpu")))
    twins = latency._timed_model(converter, held, watch)
    with torch.inference_mode():
        expected = prefill(assemble(converter.model.config, modules), ids)
        assert watch.read() == {}
        assert torch.equal(prefill(twins, ids), expected)
    assert {key: set(vars(module)) for key, module in modules.items()} == attributes
    spent = watch.read()
    assert spent.keys() <= modules.keys()
    assert spent.keys() >= {c.name for c in converter.components if "experts" not in c.name}
    assert watch.read() == {}


class _Ticking(latency._Clock):
    """Every look at it is a second later."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now


def test_an_entrance_that_uses_another_is_counted_once() -> None:
    class Nested(torch.nn.Module):
        def forward(self, x: int) -> int:
            return self.project(x) + self.project(x)

        def project(self, x: int) -> int:
            return x

    watch = latency._Stopwatch(_Ticking())
    twin = watch.timed("nested", Nested())
    assert twin(2) == 4
    assert twin.project(1) == 1  # type: ignore[operator]
    assert watch.read() == {"nested": 2}


def table(seconds: dict[str, dict[str, float]] | None = None) -> LatencyTable:
    held = seconds or {"a": {"fp16": 3e-3, "int8": 1e-3}, "b": {"fp16": 2e-3, "nf4": 5e-3}, "c": {"fp16": 1e-3}}
    checks = tuple(Check(m, p) for m, p in ((0.010, 0.011), (0.020, 0.020), (0.040, 0.030)))
    return LatencyTable(1, 128, "cpu", 2, 31, 0.012, 4e-3, held, checks)


def test_a_map_takes_the_rest_and_each_components_own_time() -> None:
    assert table().predict({"a": "int8", "b": "nf4", "c": "fp16"}) == 11e-3
    assert table().predict({"b": "nf4"}) == table().predict({"a": "fp16", "b": "nf4", "c": "fp16"}) == 13e-3
    assert table().predict({}) == 10e-3
    assert table().reference == pytest.approx(13e-3 + 5e-3)  # the slowest takes 13 ms, the fastest 8
    assert table({"a": {"fp16": 1e-3}}).reference == pytest.approx(10e-3)
    with pytest.raises(KeyError):
        table().predict({"a": "nf4"})


def test_the_error_is_relative_and_ranks_are_correlated() -> None:
    error = table().error
    assert error.median == pytest.approx(0.1)
    assert error.worst == pytest.approx(0.25)
    assert error.spearman == pytest.approx(1)
    swapped = replace(table(), checks=(Check(1.0, 2.0), Check(2.0, 1.0), Check(3.0, 3.0)))
    assert swapped.error.spearman == pytest.approx(0.5)


def test_a_table_is_read_back_as_it_was_written() -> None:
    stored = json.loads(json.dumps(table().to_json()))
    again = table_from_json(stored)
    assert (again.seconds, again.checks, again.digest) == (table().seconds, table().checks, table().digest)
    assert stored["error"]["worst"] == table().error.worst
    assert table({"a": {"fp16": 1e-3}}).digest != table().digest
    with pytest.raises((KeyError, TypeError)):
        table_from_json({"colour": "red"})


def test_checks_are_real_maps_of_the_space_from_wide_to_narrow_and_none_that_the_rest_is_fitted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converter = converter_of(MAMBA)
    choices = choices_of(converter)
    converted: list[PrecisionMap] = []
    real = converter.convert

    def convert(held: PrecisionMap) -> object:
        converted.append(held)
        return real(held)

    monkeypatch.setattr(converter, "convert", convert)
    measure_latency(converter, choices, some_windows().ids[:1], checks=5, rounds=1)
    widest, lowest, *mixed = (held.to_json() for held in converted)
    assert widest == {name: held[0] for name, held in choices.items()}
    assert lowest == {name: held[-1] for name, held in choices.items()}
    assert len(mixed) == latency._FITTED + 5
    assert len({tuple(held.items()) for held in mixed}) == len(mixed)
    assert all(held[name] in choices[name] for held in mixed for name in choices)
    lowered = [sum(precision != "fp16" for precision in held.values()) for held in mixed[-5:]]
    assert lowered[0] < lowered[-1]


def test_measuring_can_be_interrupted_between_two_rounds() -> None:
    looks = Counter[str]()

    def look() -> None:
        looks["rounds"] += 1
        if looks["rounds"] == 2:
            raise InterruptedError

    converter = converter_of(MAMBA)
    with pytest.raises(InterruptedError):
        measure_latency(converter, choices_of(converter), some_windows().ids[:1], before_round=look)


def test_a_component_that_sleeps_costs_what_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    converter = converter_of(MAMBA)
    slow = next(c for c in find_components(converter.model) if c.kind == "in_proj")
    module = converter.module(slow, "nf4")
    real = module.forward

    def sleeping(x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 0.02
        out: torch.Tensor = real(x)
        return out

    monkeypatch.setattr(module, "forward", sleeping)
    monkeypatch.setattr(latency._Clock, "mark", lambda clock: now)  # nothing else takes any time
    monkeypatch.setattr(Residual, "compiled", lambda residual: None)  # which has a clock of its own
    found = measure_latency(converter, choices_of(converter), some_windows().ids[:1], rounds=7)
    spent = {(name, precision) for name, times in found.seconds.items() for precision in times if times[precision] > 0}
    assert spent == {(slow.name, "nf4")}
    assert found.seconds[slow.name]["nf4"] == 0.02
    assert found.rest == 0
    assert {check.measured for check in found.checks} == {0.0, 0.02}
    assert [check.predicted for check in found.checks] == [check.measured for check in found.checks]
