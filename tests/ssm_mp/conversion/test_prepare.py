"""The preparation before rounding: what is folded changes nothing, and what is scaled as it is rounded is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm_mp.artifact import read_artifact, save_artifact, stored_arrays, tensor_bytes
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.prepare import _Seen, folded, foldings_of, prepare, prepared_model, unfoldable_of
from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.errors import ExportError, PrecisionMapError
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.kernels import calls
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.inputs import StaticInput, rounded
from ssm_mp.modules.linear import Linear
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap, pinned_names
from ssm_mp.precisions.int8 import INT8
from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.quantize import powers_of_two
from ssm_mp.precisions.stored import FloatTensor, ScaledColumns
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.scheme import ScaleRule, Scheme
from tests.families.models import MODELS, fp32_of, windows_of
from tests.ssm_mp.precisions.outside import OFFSET6, register


def random_scales(model: LanguageModel, seed: int = 0) -> list[Tensor]:
    """Powers of two from ¼ to 4, or up to 1 where a folding says so: what a preparation folds."""
    generator = torch.Generator().manual_seed(seed)
    every = foldings_of(model.config)
    ends = [(-4, 1) if folding.at_most_one else (-2, 3) for folding in every]
    return [
        powers_of_two(torch.randint(*end, (folding.size,), generator=generator, dtype=torch.int8))
        for folding, end in zip(every, ends, strict=True)
    ]


def logits(model: LanguageModel, name: str) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(windows_of(name).ids).double()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_scales_leave_the_logits_as_they_are(name: str) -> None:
    model = fp32_of(name)
    before = logits(model, name)
    after = logits(folded(model, random_scales(model)), name)
    assert (after - before).abs().max() <= 1e-5 * before.std()


@pytest.mark.parametrize("name", MODELS)
def test_every_folding_changes_its_tensors_and_no_others(name: str) -> None:
    model = fp32_of(name)
    every = foldings_of(model.config)
    changed = {rows.tensor for f in every for rows in f.producers} | {c for f in every for c in f.consumers}
    other = folded(model, random_scales(model))
    for component in find_components(model):
        for p in component.parameters:
            mine, theirs = (held_by(m.component(component.name), p.leaf).tensor() for m in (model, other))
            assert torch.equal(mine, theirs) is (p.name not in changed), p.name
    assert every


def test_the_given_model_is_left_as_it_is() -> None:
    model = fp32_of("qwen3_next/plain")
    before = {name: array.clone() for name, array in stored_arrays(model).items()}
    folded(model, random_scales(model))
    assert all(torch.equal(array, before[name]) for name, array in stored_arrays(model).items())


def test_a_model_that_is_run_layer_by_layer_is_refused() -> None:
    model = fp32_of("mamba")
    modules = {c.name: model.component(c.name) for c in find_components(model)}
    large = assemble(model.config, modules, after_layer=lambda part: None)
    with pytest.raises(PrecisionMapError, match="prepare = 'scales'.*memory_gib"):
        folded(large, random_scales(large))


def test_powers_of_two_are_exact() -> None:
    exponent = torch.arange(-100, 101, dtype=torch.int8)
    assert powers_of_two(exponent).tolist() == [2.0**e for e in range(-100, 101)]


@pytest.mark.parametrize("precision", [INT8, OFFSET6])
@pytest.mark.parametrize("tokens", [3, 100])
def test_the_product_of_scaled_inputs_is_that_of_what_they_are_rounded_to(tokens: int, precision: Precision) -> None:
    generator = torch.Generator().manual_seed(tokens)
    exponent = torch.randint(-3, 4, (72,), dtype=torch.int8, generator=generator)
    weight = torch.randn(40, 72, generator=generator)
    stored = ScaledColumns(precision.store(weight * powers_of_two(exponent), "weight", ScaleRule()), exponent)
    assert (stored.tensor() - weight).norm() < 0.6 * weight.norm()
    assert torch.equal(stored.rows(torch.tensor([7, 0])), stored.tensor()[[7, 0]])
    inputs = StaticInput(torch.tensor([0.02], dtype=torch.float16), exponent)
    x = torch.randn(tokens, 72, generator=generator) * powers_of_two(exponent)
    expected = rounded(inputs, x).double() @ stored.tensor().double().T
    found = Linear(stored, None, inputs)(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4 * float(expected.std()))


def made(name: str = "mamba", precision: str = "int8") -> tuple[LanguageModel, Converter, PrecisionMap]:
    """A model, its unfoldable components scaled, at a precision of static inputs wherever that is allowed."""
    model = fp32_of(name)
    exponents = {}
    for i, one in enumerate(unfoldable_of(model.config)):
        width = held_by(model.component(one), "weight").shape[1]
        exponents[one] = (torch.arange(width) % 5 - 2 + i % 2).to(torch.int8)
    statistics = calibrate(model, windows_of(name, 8), exponents=exponents)
    converter = Converter(model, Scheme("static"), statistics)
    pins = pinned_names(converter.components)
    precisions = tuple((c.name, "fp16" if c.name in pins else precision) for c in converter.components)
    return model, converter, PrecisionMap(precisions)


@pytest.mark.parametrize("precision", ["int8", "offset6"])
def test_what_is_counted_is_what_is_stored(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model, converter, everywhere = made(precision=precision)
    converted = converter.convert(everywhere)
    assert everywhere.bytes(converter.components, "static") == tensor_bytes(converted)
    plain = everywhere.bytes(find_components(model), "static")
    widths = [held_by(model.component(one), "weight").shape[1] for one in unfoldable_of(model.config)]
    assert tensor_bytes(converted) == plain + sum(widths)


@pytest.mark.parametrize("precision", ["int8", "offset6"])
def test_an_artifact_with_scaled_inputs_loads_as_it_was(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    _, converter, everywhere = made(precision=precision)
    converted = converter.convert(everywhere)
    save_artifact(tmp_path / "a", converted, everywhere, Scheme("static"), {})
    loaded = read_artifact(tmp_path / "a").model
    name = unfoldable_of(loaded.config)[0]
    assert isinstance(held_by(loaded.component(name), "weight"), ScaledColumns)
    assert torch.equal(logits(loaded, "mamba"), logits(converted, "mamba"))


def test_scaled_inputs_are_rounded_as_those_of_a_plain_quantiser_that_are_scaled_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-8, 9, (72,), dtype=torch.int8, generator=generator)
    scale, x = torch.tensor([0.02], dtype=torch.float16), torch.randn(5, 72, generator=generator)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("ssm_mp.kernels.calls.usable", lambda *tensors: False)
        found = StaticInput(scale, exponent)(x * powers_of_two(exponent))
        for ours, theirs in zip(found, StaticInput(scale)(x), strict=True):
            assert torch.equal(ours, theirs)


def test_with_kernels_and_without_them_the_logits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, converter, everywhere = made()
    converted = converter.convert(everywhere)
    fast = logits(converted, "mamba")
    monkeypatch.setattr("ssm_mp.kernels.calls.usable", lambda *tensors: False)
    slow = logits(converted, "mamba")
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-3 * float(slow.std()))


def test_a_layer_with_scaled_inputs_is_not_compiled_as_a_whole() -> None:
    _, converter, everywhere = made()
    converted = converter.convert(everywhere)
    ids = windows_of("mamba").ids
    with torch.inference_mode():
        _, states = converted.carry(ids[:, :4])
        assert CompiledDecoder.of(converted, states, 4) is None
    scaled, plain = (converted.component(f"layers.0.ssm.{leaf}") for leaf in ("out_proj", "in_proj"))
    assert isinstance(scaled, Linear)
    assert isinstance(plain, Linear)
    assert scaled.matrix() is None
    assert not calls.compiled() or plain.matrix() is not None


def test_token_after_token_gives_what_all_at_once_gives() -> None:
    _, converter, everywhere = made()
    converted = converter.convert(everywhere)
    ids = windows_of("mamba").ids
    found, states = [], None
    with torch.inference_mode():
        for t in range(ids.shape[1]):
            hidden, states = converted.carry(ids[:, t : t + 1], states, t)
            found.append(converted.head(hidden[:, -1]))
    expected = logits(converted, "mamba")
    torch.testing.assert_close(torch.stack(found, 1).double(), expected, rtol=1e-3, atol=2e-2 * float(expected.std()))


def test_a_stack_of_maps_scales_the_rows_that_are_int8_there() -> None:
    _, converter, everywhere = made()
    first, *_ = unfoldable_of(converter.model.config)
    maps = [everywhere, everywhere.changed({first: "fp16"}), everywhere.changed({"layers.0.ssm.in_proj": "fp16"})]
    windows = windows_of("mamba")
    for one, found in zip(maps, evaluate_stacked(converter, maps, windows), strict=True):
        assert isinstance(found, Evaluation)
        np.testing.assert_allclose(found.nll, evaluate(converter.convert(one), windows).nll, rtol=1e-4)


def test_other_runtimes_refuse_scaled_inputs_and_take_the_rest() -> None:
    _, converter, everywhere = made()
    with pytest.raises(ExportError, match=r"layers.0.ssm.out_proj.*prepare = \"none\""):
        Exportable("tiny", converter.convert(everywhere), everywhere)
    kept = everywhere.changed(dict.fromkeys(unfoldable_of(converter.model.config), "fp16"))
    Exportable("tiny", converter.convert(kept), kept)


def test_what_does_not_help_is_left_as_it_is() -> None:
    name = "itera"
    model = fp32_of(name)
    found = prepare(model, replace(windows_of(name, 1)), ("fp16", "int8"), Scheme("static"))  # hardly any token
    assert found.changed == 0
    assert not found.inputs
    assert torch.equal(logits(prepared_model(model, found), name), logits(model, name))


def test_scales_that_spread_the_channels_are_taken_back() -> None:
    model = fp32_of("mamba")
    first, generator = foldings_of(model.config)[0], torch.Generator().manual_seed(0)
    spread = powers_of_two(torch.randint(-4, 5, (first.size,), generator=generator, dtype=torch.int8))
    worse = folded(model, [spread, *[None] * (len(foldings_of(model.config)) - 1)])
    found = prepare(worse, windows_of("mamba", 24), ("fp16", "int3"), Scheme("none"))
    assert found.foldings[0].any()
    better = prepared_model(worse, found)
    weight = held_by(model.component(first.consumers[0].removesuffix(".weight")), "weight").tensor()
    ranges = [
        held_by(m.component(first.consumers[0].removesuffix(".weight")), "weight").tensor().abs().amax(dim=0)
        for m in (worse, better)
    ]
    spreads = [float((r / weight.abs().amax(dim=0)).log2().std()) for r in ranges]
    assert spreads[1] < spreads[0]


def with_loud_inputs(model: LanguageModel) -> LanguageModel:
    """One channel of each `out_proj`'s inputs is louder: its `D` is a hundred times as large."""
    modules = {c.name: model.component(c.name) for c in find_components(model)}
    for component in find_components(model):
        if component.kind == "D":
            (parameter,) = component.parameters
            value = held_by(modules[component.name], parameter.leaf).tensor().clone()
            value[0] *= 100
            modules[component.name] = component.form.module({parameter.leaf: FloatTensor(value)}, None)
    return assemble(model.config, modules)


def test_inputs_are_scaled_within_bounds_where_enough_tokens_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = with_loud_inputs(fp32_of("mamba")), windows_of("mamba", 48)
    few = prepare(model, windows, ("fp16", "int8"), Scheme("static"))
    assert not few.inputs
    monkeypatch.setattr("ssm_mp.conversion.prepare.FEWEST_ALONE", windows.ids.numel())
    found = prepare(model, windows, ("fp16", "int8"), Scheme("static"))
    assert found.inputs
    for exponent in found.inputs.values():
        assert int(exponent.abs().max()) <= 2
        assert int(exponent[0]) == int(exponent.max()) > 0
    assert not prepare(model, windows, ("fp16", "nf4"), Scheme("static")).inputs  # no integers to scale


def test_tokens_that_are_kept_come_from_all_windows() -> None:
    windows, length, k = 4096, 8, 3
    seen = _Seen(windows)
    for i in range(windows):
        seen.see(torch.full((1, length, k), float(i + 1)), held_out=i % 4 == 3)
    for held_out, kept in seen.kept.items():
        tokens = torch.cat(kept)[:, 0]
        assert len(tokens) <= (2048 if held_out else 3 * 2048)
        assert float(tokens.max()) > 0.95 * windows
        assert float(tokens.min()) < 0.05 * windows
    assert float(seen.magnitudes()[0][0]) == windows - 1
