"""Every component rounded layer by layer: complete, better than the nearest on what it was made of, said where not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from ssm_mp.components import find_components
from ssm_mp.conversion import rounding
from ssm_mp.conversion.calibrate import FEW_TOKENS
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.moments import Gathered, end_moments, in_parts, layer_moments
from ssm_mp.conversion.regroup import Grouping, regrouped
from ssm_mp.conversion.rounding import Rounded, compensable, moment_bytes, rounded
from ssm_mp.data import Windows
from ssm_mp.model import LanguageModel, assemble, build
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.compensate import DAMPINGS, Moment, output_error
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.precisions.stored import Stored
from ssm_mp.scheme import ScaleRule, Scheme
from tests.families.models import checkpoint_of, every_model, fp32_of, windows_of
from tests.tiny import MAMBA, random_model, some_windows

ASKED = ("nf4", "int3g32", "nf2")
FP32_WEIGHTS = Scheme("none")


def made(model: LanguageModel, windows: Windows, precisions: tuple[str, ...] = ASKED) -> dict[tuple[str, str], Stored]:
    found = rounded(model, windows, find_components(model), precisions)
    return {(one.component, precision): held for one in found for precision, held in one.held.items()}


def weight_of(model: LanguageModel, component: str) -> Tensor:
    return held_by(model.component(component), "weight").tensor()


def moments_of(model: LanguageModel, windows: Windows) -> dict[str, Gathered]:
    parts = in_parts(windows.ids)
    found: dict[str, Gathered] = {}
    with torch.no_grad():
        states = [model.embed(ids) for ids in parts]
    for i in range(len(model.layers)):
        found |= layer_moments(model, i, states)
    return found | end_moments(model, states)


def nearest(model: LanguageModel, component: str, precision: str) -> Tensor:
    return get_precision(precision).store(weight_of(model, component), "weight", ScaleRule("mse")).tensor()


@every_model
def test_every_weight_that_multiplies_or_is_looked_up_gets_every_precision_asked(name: str) -> None:
    model, windows = fp32_of(name), windows_of(name, 16)
    found = made(model, windows, ("fp16", "int8", *ASKED))
    wanted = [c for c in find_components(model) if c.multiplies_inputs or c.kind == "embedding"]
    assert found.keys() == {(c.name, precision) for c in wanted for precision in ASKED}
    for component in wanted:
        shape = next(p.shape for p in component.parameters if p.leaf == "weight")
        for precision in ASKED:
            held, expected = found[component.name, precision], get_precision(precision).arrays(shape, "weight")
            assert held.shape == shape
            assert {n: (tuple(a.shape), a.dtype) for n, a in held.arrays().items()} == {
                n: (spec.shape, spec.dtype) for n, spec in expected.items()
            }
            off = (held.tensor() - weight_of(model, component.name)).norm() / weight_of(model, component.name).norm()
            assert off < 1.0


@every_model
def test_each_component_loses_less_on_the_windows_than_by_the_nearest(name: str) -> None:
    model, windows = fp32_of(name), windows_of(name, 40)
    moments, totals = moments_of(model, windows), [0.0, 0.0]
    for (component, precision), held in made(model, windows, ("int3", "nf2")).items():
        gathered, weight = moments[component], weight_of(model, component)
        if min(gathered.tokens) < FEW_TOKENS:
            continue
        compensated, plain = (
            output_error(weight, one, gathered.all) for one in (held.tensor(), nearest(model, component, precision))
        )
        # as good as the same where inputs are independent, as those of a lookup are
        assert compensated <= plain * 1.001, (component, precision)
        totals[0], totals[1] = totals[0] + compensated / plain, totals[1] + 1
    assert totals[0] < 0.9 * totals[1]


@pytest.mark.parametrize("name", ["mamba", "lfm2/plain", "bamba/plain", "mamba2/groups-2"])
def test_a_converted_model_is_nearer_to_fp32_than_with_nearest_weights(name: str) -> None:
    model, windows = fp32_of(name), windows_of(name, 40)
    rules = PrecisionMap.from_rules({"*": "int3"}, find_components(model))
    kept = made(model, windows, ("int3",))
    kl = []
    for weights in (kept, None):
        converted = Converter(model, FP32_WEIGHTS, rounded=weights).convert(rules)
        with torch.no_grad():
            expected, found = (one(windows.ids).double().log_softmax(-1) for one in (model, converted))
        kl.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    assert kl[0] < 0.9 * kl[1]


def test_rounded_weights_are_what_the_converter_puts_into_a_model() -> None:
    model, windows = random_model(MAMBA), some_windows(16)
    kept = made(model, windows, ("nf4",))
    converter = Converter(model, FP32_WEIGHTS, rounded=kept)
    converted = converter.convert(PrecisionMap.from_rules({"*": "nf4"}, converter.components))
    for component, _ in kept:
        assert held_by(converted.component(component), "weight") is kept[component, "nf4"]
    at_int3 = converter.convert(PrecisionMap.from_rules({"*": "int3"}, converter.components))
    plain = Converter(model, FP32_WEIGHTS).convert(PrecisionMap.from_rules({"*": "int3"}, converter.components))
    assert torch.equal(at_int3(windows.ids), plain(windows.ids))


def test_weights_read_from_a_file_go_to_where_the_model_is() -> None:
    model = random_model(MAMBA)
    kept = made(model, some_windows(16), ("nf4",))
    converter = Converter(model.to("meta"), FP32_WEIGHTS, rounded=kept)
    component = next(c for c in converter.components if c.name == "layers.0.ssm.in_proj")
    module = converter.module(component, "nf4")
    assert held_by(module, "weight").device.type == "meta"


SHUNNED, AT = 3, "layers.2.feed_forward"


@cache
def shunning(experts: Grouping) -> LanguageModel:
    """A model of whose experts one layer never chooses number 3."""
    checkpoint = checkpoint_of("lfm2_moe/plain")
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    tensors[f"{AT}.expert_bias"][SHUNNED] = -100.0
    found = regrouped(replace(checkpoint, tensors=tensors), experts)
    return build(found.config, found.tensors)


def by_no_moment(weight: Tensor) -> Tensor:
    """A weight at the nearest levels of nf4."""
    nf4, k = get_precision("nf4"), weight.shape[1]
    assert isinstance(nf4, Grouped)
    return nf4.compensated(weight, Moment(torch.zeros(1, k, k)), DAMPINGS[0]).tensor()


@pytest.mark.parametrize("experts", ["each", "together"])
def test_an_expert_that_hardly_a_token_reached_is_rounded_to_the_nearest_and_said(experts: Grouping) -> None:
    model, said = shunning(experts), list[str]()
    found = rounded(model, windows_of("lfm2_moe/plain", 48), find_components(model), ("nf4",), said.append)
    held = {one.component: one.held["nf4"].tensor() for one in found}
    for leaf in ("w1", "w2", "w3"):
        name = f"{AT}.experts.{SHUNNED}.{leaf}" if experts == "each" else f"{AT}.experts.{leaf}"
        plain = by_no_moment(weight_of(model, name))
        size = len(plain) // (1 if experts == "each" else 5)
        rows = slice(0, None) if experts == "each" else slice(SHUNNED * size, (SHUNNED + 1) * size)
        assert torch.equal(held[name][rows], plain[rows])
        other = name if experts == "together" else f"{AT}.experts.0.{leaf}"
        assert not torch.equal(held[other][:size], by_no_moment(weight_of(model, other))[:size])
        named = name if experts == "each" else f"{name}, experts {SHUNNED}"
        assert f"note: {named}: reached by fewer than {FEW_TOKENS} calibration tokens, rounded to the nearest" in said


def test_fewer_tokens_than_inputs_are_said_and_damped_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said, damped = fp32_of("lfm2/plain"), list[str](), list[float]()
    compensated = Grouped.compensated

    def seen(self: Grouped, weight: Tensor, moment: Moment, damping: float) -> Stored:
        damped.append(damping)
        return compensated(self, weight, moment, damping)

    monkeypatch.setattr(Grouped, "compensated", seen)
    windows = windows_of("lfm2/plain", 3, length=23)  # 69 tokens; w2 of a feed-forward has 72 inputs
    components = [c for c in find_components(model) if c.name.endswith("w2") or c.name.endswith("w1")]
    list(rounded(model, windows, components, ("nf4", "nf2"), said.append))
    wide = [c.name for c in components if next(p.shape[-1] for p in c.parameters if p.leaf == "weight") > 69]
    assert 0 < len(wide) < len(components)
    assert len(said) == len(wide)
    assert all(
        f"note: {name}: 69 calibration tokens for 72 inputs" in line for name, line in zip(wide, said, strict=True)
    )
    assert damped.count(DAMPINGS[-1]) >= 2 * len(wide)
    said.clear()
    list(rounded(model, windows_of("lfm2/plain", 40), components, ("nf4",), said.append))
    assert said == []


def test_a_model_that_is_run_layer_by_layer_gives_the_same_and_passes_every_part() -> None:
    model, windows = fp32_of("jamba/experts"), windows_of("jamba/experts", 12)
    passed: list[nn.Module] = []
    large = assemble(model.config, model._components, after_layer=passed.append)
    one, other = made(model, windows), made(large, windows)
    assert one.keys() == other.keys()
    for key in one:
        assert all(
            torch.equal(a, b) for a, b in zip(one[key].arrays().values(), other[key].arrays().values(), strict=True)
        )
    assert passed == [large.embedding, *large.layers, large.embedding, large.lm_head]


def test_layers_come_one_after_another_and_the_ends_last() -> None:
    model, done = random_model(MAMBA), list[tuple[str, int]]()

    def steps(what: str, count: int):  # type: ignore[no-untyped-def]
        return lambda: done.append((what, count))

    names = [one.component for one in rounded(
        model, some_windows(8), find_components(model), ("nf4",), steps=steps
    )]  # fmt: skip
    assert names[-1] == "embedding"
    layers = [int(name.split(".")[1]) for name in names[:-1]]
    assert layers == sorted(layers)
    assert done == [("compensating rounding", 3)] * 3


def test_only_the_components_asked_for_are_rounded_and_nothing_without_a_book() -> None:
    model = random_model(MAMBA)
    chosen = [c for c in find_components(model) if c.name == "layers.1.ssm.out_proj"]
    found = list(rounded(model, some_windows(8), chosen, ("nf4",)))
    assert [one.component for one in found] == ["layers.1.ssm.out_proj"]
    assert list(rounded(model, some_windows(8), find_components(model), ("fp16", "int8"))) == []
    assert [name for name in PRECISIONS if not compensable(name)] == ["fp16", "int8"]


def test_a_precision_that_cannot_hold_a_weight_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(MAMBA)
    weight = held_by(model.component("layers.0.ssm.in_proj"), "weight")
    weight.tensor().data[0, 0] = 9e4  # levels of nf4 reach 1, of int3 4 times the scale
    chosen = [c for c in find_components(model) if c.name == "layers.0.ssm.in_proj"]
    found = list(rounded(model, some_windows(8), chosen, ("int4", "nf4")))
    assert isinstance(found[0], Rounded)
    assert list(found[0].held) == ["int4"]


@pytest.mark.parametrize("name", ["mamba", "lfm2_moe/plain", "lfm2_moe/plain-together"])
def test_moments_take_no_more_than_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = fp32_of(name), windows_of(name, 4)
    most = 0

    def counted(*given: object) -> dict[str, Gathered]:
        nonlocal most
        found = layer_moments(*given)  # type: ignore[arg-type]
        held = {name: 4 * (one.fit.second.numel() + one.held.second.numel()) for name, one in found.items()}
        # their sums, without experts that are hardly reached, and their factors; those of one are made in float64
        beside = [held[name] * 20 // 8 + 48 * one.fit.second[0].numel() for name, one in found.items()]
        most = max(most, sum(held.values()) + max(beside))
        return found

    monkeypatch.setattr(rounding, "layer_moments", counted)
    made(model, windows, ("nf4",))
    assert most <= moment_bytes(find_components(model)) < 2 * most


def test_a_weight_does_not_depend_on_which_other_precisions_are_asked_for() -> None:
    """A study that gets more choices keeps what it measured."""
    model, windows = fp32_of("lfm2/plain"), windows_of("lfm2/plain", 16)
    alone, beside = made(model, windows, ("nf4",)), made(model, windows, ("nf4", "int3", "nf2"))
    for key, held in alone.items():
        assert all(torch.equal(array, beside[key].arrays()[suffix]) for suffix, array in held.arrays().items())
