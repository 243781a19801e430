"""From a line of the registry to a model that is evaluated, decoded and kept: no other place knows of a precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_mp.artifact import load_artifact, save_artifact, stored_arrays
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.decoding.decode import generate, open_decoder, prefill
from ssm_mp.evaluation.drift import drift
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.precisions.stored import Stored
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.ssm_mp.precisions.outside import OUTSIDE, register
from tests.tiny import CONFIGS, MAMBA, random_model, some_windows

NAMES = [*(name for name in PRECISIONS if "g" not in name), "nf4g32", "int3g128", *OUTSIDE]
"""Of every book, and of groups of other sizes some."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def everywhere(name: str, model: LanguageModel) -> PrecisionMap:
    """Every component that is not always pinned at one precision."""
    return PrecisionMap.uniform(name, find_components(model), pins=frozenset())


def unpacked(model: LanguageModel) -> LanguageModel:
    """The float32 model of the numbers that a converted one stands for."""
    tensors = {}
    for component in find_components(model):
        module = model.component(component.name)
        for parameter in component.parameters:
            stored = module if isinstance(module, Stored) else getattr(module, parameter.leaf)
            tensors[parameter.name] = stored.tensor()
    return build(model.config, tensors)


@pytest.mark.parametrize("config", ["huggingface", "itera"])
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_evaluates_as_the_numbers_that_it_holds(name: str, config: str) -> None:
    model, windows = random_model(CONFIGS[config]), some_windows()
    converted = convert(model, everywhere(name, model), Scheme("none"))
    found, expected = evaluate(converted, windows), evaluate(unpacked(converted), windows)
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    assert drift(converted, model, windows).whole.stderr_percent >= 0


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_decodes_as_it_reads(name: str) -> None:
    model = random_model(MAMBA)
    converted = convert(model, everywhere(name, model), Scheme("none"))
    ids = torch.arange(12)[None] % MAMBA.vocabulary
    begun = prefill(converted, ids[:, :4])
    if name in OUTSIDE:
        assert CompiledDecoder.of(converted, begun.states, begun.position) is None
    decoder = open_decoder(converted, begun)
    for t in range(4, 12):
        torch.testing.assert_close(decoder.step(ids[:, t]), converted(ids[:, : t + 1])[:, -1], rtol=1e-3, atol=1e-4)
    assert generate(converted, ids[:, :4], 5).shape == (1, 9)


@pytest.mark.parametrize("scheme", ["none", "static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_of_it_has_the_predicted_bytes_and_loads_as_the_same_model(
    tmp_path: Path, name: str, scheme: ActivationScheme
) -> None:
    model, windows = random_model(MAMBA), some_windows()
    chosen, how = everywhere(name, model), Scheme(scheme)
    converted = convert(model, chosen, how, calibrate(model, windows))
    path = save_artifact(tmp_path / "kept", converted, chosen, how, {})
    stored = sum(array.numel() * array.element_size() for array in stored_arrays(converted).values())
    assert stored == chosen.bytes(find_components(model), scheme)
    assert evaluate(load_artifact(path), windows).nll.tolist() == evaluate(converted, windows).nll.tolist()


@pytest.mark.parametrize("config", ["mamba", "itera"])
def test_maps_of_many_precisions_are_evaluated_together_as_alone(config: str) -> None:
    model, windows = random_model(CONFIGS[config]), some_windows()
    components = find_components(model)
    converter = Converter(model, Scheme("dynamic"))
    free = [component.name for component in components if component.pin is None]
    mixed = {name: NAMES[i % len(NAMES)] for i, name in enumerate(free)}
    plain = PrecisionMap.uniform("fp16", components)
    maps = [plain, plain.changed(mixed), *(plain.changed({free[2]: name, free[-1]: name}) for name in OUTSIDE)]
    for one, together in zip(maps, evaluate_stacked(converter, maps, windows), strict=True):
        assert isinstance(together, Evaluation)
        assert together.nll == pytest.approx(evaluate(converter.convert(one), windows).nll, rel=1e-4)


def test_every_name_is_of_a_registered_precision() -> None:
    assert {get_precision(name).name for name in PRECISIONS} >= set(NAMES)
