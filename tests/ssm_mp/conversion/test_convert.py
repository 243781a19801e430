"""Calibration and conversion."""

from __future__ import annotations

import copy

import pytest
import torch

from ssm_mp.artifact import stored_arrays, tensor_bytes
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import LanguageModel, build
from ssm_mp.modules.linear import Linear
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.quantize import quantize_tensor
from ssm_mp.scheme import ActivationScheme, ScaleRule, Scheme
from tests.tiny import CONFIGS, ITERA, MAMBA, random_model, random_tensors, some_windows

SCHEMES: tuple[ActivationScheme, ...] = ("static", "dynamic", "none")


def uniform(model: LanguageModel, precision: str) -> PrecisionMap:
    return PrecisionMap.uniform(precision, find_components(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_all_fp16_stores_exactly_the_halves(family: str) -> None:
    tensors = random_tensors(CONFIGS[family])
    model = build(CONFIGS[family], tensors)
    arrays = stored_arrays(convert(model, uniform(model, "fp16"), Scheme("none")))
    assert arrays.keys() == tensors.keys()
    assert all(torch.equal(arrays[name], tensors[name].half()) for name in tensors)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_nothing_stays_float32_and_bytes_are_as_predicted(
    family: str, scheme: ActivationScheme, precision: str
) -> None:
    model = random_model(CONFIGS[family])
    chosen = uniform(model, precision)
    converted = convert(model, chosen, Scheme(scheme), calibrate(model, some_windows()))
    assert {array.dtype for array in stored_arrays(converted).values()} <= {torch.float16, torch.int8}
    assert not any(t.dtype == torch.float32 for t in [*converted.parameters(), *converted.buffers()])
    assert tensor_bytes(converted) == chosen.bytes(find_components(model), scheme)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conversion_returns_a_new_model_and_leaves_the_old(family: str, scheme: ActivationScheme) -> None:
    model = random_model(CONFIGS[family])
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, uniform(model, "int8"), Scheme(scheme), calibrate(model, some_windows()))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = {t.untyped_storage().data_ptr() for t in [*converted.parameters(), *converted.buffers()]}
    assert not ours & {t.untyped_storage().data_ptr() for t in model.parameters()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_stays_close_to_fp32(family: str, scheme: ActivationScheme) -> None:
    model, windows = random_model(CONFIGS[family]), some_windows()
    converted = convert(model, uniform(model, "int8"), Scheme(scheme), calibrate(model, windows))
    exact, found = evaluate(model, windows).perplexity, evaluate(converted, windows).perplexity
    assert found != exact
    assert found == pytest.approx(exact, rel=0.05)


def test_a_static_linear_is_the_integer_product_of_its_parts() -> None:
    model = random_model(MAMBA)
    statistics = calibrate(model, some_windows())
    converted = convert(model, uniform(model, "int8"), Scheme("static"), statistics)
    layer = converted.component("layers.0.ssm.dt_proj")
    assert isinstance(layer, Linear)
    assert isinstance(layer.weight, Int8Tensor)
    x = torch.randn(5, 2)
    scale = statistics["layers.0.ssm.dt_proj"].scale(ScaleRule()).float()
    quantized = quantize_tensor(x, scale).long()
    product = (quantized @ layer.weight.q.long().T).float()
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), product * scale * layer.weight.scale.float() + layer.bias.tensor())


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantised_inputs_do_not_hide_what_is_not_finite(activations: ActivationScheme, value: float) -> None:
    model = random_model(MAMBA)
    converted = convert(model, uniform(model, "int8"), Scheme(activations), calibrate(model, some_windows(4)))
    x = torch.randn(3, 16)
    x[1, 2] = value
    assert not bool(torch.isfinite(converted.component("layers.0.ssm.in_proj")(x)[1]).all())


def test_dynamic_scales_are_per_token() -> None:
    model = random_model(MAMBA)
    converted = convert(model, uniform(model, "int8"), Scheme("dynamic"))
    layer = converted.component("layers.0.ssm.in_proj")
    x = torch.randn(1, 16)
    torch.testing.assert_close(layer(torch.cat([x, 1000 * x]))[1], 1000 * layer(x)[0])


def test_modules_are_made_once_and_shared() -> None:
    model = random_model(MAMBA)
    converter = Converter(model, Scheme("none"))
    a = converter.convert(uniform(model, "int8"))
    b = converter.convert(uniform(model, "int8").changed({"embedding": "fp16"}))
    assert a is not b
    assert a.component("layers.0.ssm.in_proj") is b.component("layers.0.ssm.in_proj")
    assert a.embedding is not b.embedding


def test_overflow_names_the_tensor() -> None:
    tensors = random_tensors(MAMBA)
    tensors["layers.1.ssm.out_proj.weight"][0, 0] = 1e6
    model = build(MAMBA, tensors)
    with pytest.raises(InfeasibleError, match=r"layers\.1\.ssm\.out_proj\.weight cannot be fp16.*1e\+06"):
        convert(model, uniform(model, "fp16"), Scheme("none"))
    converter = Converter(model, Scheme("none"))
    component = next(c for c in converter.components if c.name == "layers.1.ssm.out_proj")
    assert "cannot be fp16" in (converter.infeasible(component, "fp16") or "")
    assert converter.infeasible(component, "int8") is None


def test_the_recurrence_is_never_converted_below_fp16() -> None:
    model = random_model(MAMBA)
    unpinned = uniform(model, "fp16").changed({"layers.0.ssm.A_log": "int8"})
    with pytest.raises(PrecisionMapError, match=r"layers\.0\.ssm\.A_log is pinned to fp16"):
        convert(model, unpinned, Scheme("none"))


def test_only_the_fp32_model_can_be_converted() -> None:
    model = random_model(MAMBA)
    half = convert(model, uniform(model, "fp16"), Scheme("none"))
    with pytest.raises(PrecisionMapError, match="not float32"):
        convert(half, uniform(model, "int8"), Scheme("none"))


def test_static_conversion_needs_statistics_and_a_map_of_this_model() -> None:
    model = random_model(MAMBA)
    with pytest.raises(PrecisionMapError, match="calibration statistics"):
        convert(model, uniform(model, "int8"))
    with pytest.raises(PrecisionMapError, match="another model"):
        convert(model, uniform(random_model(ITERA), "int8"), Scheme("none"))


def test_calibration_sees_the_inputs_that_the_layer_sees() -> None:
    model, windows = random_model(MAMBA), some_windows(4)
    statistics = calibrate(model, windows)
    with torch.inference_mode():
        normed = model.component("layers.0.ssm.norm")(model.embed(windows.ids))
    assert statistics["layers.0.ssm.in_proj"].largest == pytest.approx(float(normed.abs().max()))
    assert float(statistics["layers.0.ssm.in_proj"].counts.sum()) == normed.numel()
    with_inputs = {c.name for c in find_components(model) if c.multiplies_inputs}
    assert statistics.keys() == with_inputs


def test_an_expert_that_no_token_reached_is_infeasible_when_static() -> None:
    tensors = random_tensors(ITERA)
    tensors["layers.1.moe.layer.router.gate.weight"] = torch.zeros(3, 16)  # ties: always the same two experts
    model = build(ITERA, tensors)
    statistics = calibrate(model, some_windows(2))
    converter = Converter(model, Scheme("static"), statistics)
    reasons = [converter.infeasible(c, "int8") for c in converter.components if "experts" in c.name and c.layer == 1]
    assert sum(reason is not None and "no calibration token reached it" in reason for reason in reasons) == 2
