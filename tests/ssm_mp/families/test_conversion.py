"""Every family through the whole of the model's side: components, conversion, evaluation, artifact, decoding."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssm_mp.artifact import load_artifact, read_artifact, save_artifact, stored_arrays, tensor_bytes
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import InputStatistics, calibrate
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.data import Windows
from ssm_mp.decoding.decode import generate, open_decoder, prefill, step
from ssm_mp.evaluation.drift import drift
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.evaluation.prefix_cache import PrefixCache, Prefixes
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap, pinned_names
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.families.models import PLAIN, checkpoint_of, every_model, fp32_of, off, windows_of

CHOICES = ("fp16", "int8", "nf4", "int3")
SCHEMES: tuple[ActivationScheme, ...] = ("static", "dynamic", "none")
PINNED_KINDS = {"A_log", "D", "dt_bias", "router", "correction_bias", "norm", "token_gate", "B", "C"}


@cache
def model_of(name: str) -> LanguageModel:
    return fp32_of(name)


@cache
def statistics_of(name: str) -> dict[str, InputStatistics]:
    return calibrate(model_of(name), windows_of(name, 48, seed=1))


@cache
def converter_of(name: str, activations: ActivationScheme) -> Converter:
    return Converter(model_of(name), Scheme(activations), statistics_of(name))


def mixed(name: str, seed: int, lifted: bool = False) -> PrecisionMap:
    """A map at random; lifted: what is pinned by default takes part too."""
    components, rng = find_components(model_of(name)), random.Random(seed)
    kept = {c.name for c in components if c.pin == "always" or (c.pin and not lifted)}
    return PrecisionMap(tuple((c.name, "fp16" if c.name in kept else rng.choice(CHOICES)) for c in components))


def maps_of(name: str) -> dict[str, PrecisionMap]:
    components = find_components(model_of(name))
    uniform = {precision: PrecisionMap.uniform(precision, components) for precision in ("fp16", "int8", "nf4")}
    return {**uniform, "mixed": mixed(name, 0), "lifted": mixed(name, 1, lifted=True)}


@every_model
def test_every_parameter_belongs_to_one_component_of_its_own_name(name: str) -> None:
    model = model_of(name)
    components = find_components(model)
    names = [component.name for component in components]
    assert len(set(names)) == len(names)
    parameters = [parameter.name for component in components for parameter in component.parameters]
    assert sorted(parameters) == sorted(checkpoint_of(name).tensors)
    assert sorted(component.stage for component in components) == [component.stage for component in components]
    held = {tensor.data_ptr() for component in names for tensor in model.component(component).parameters()}
    assert held == {tensor.data_ptr() for tensor in model.parameters()}


@every_model
def test_the_recurrence_is_pinned_and_what_is_delicate_is_by_default(name: str) -> None:
    components = find_components(model_of(name))
    kinds = {component.name: component.kind for component in components}
    assert {kinds[c] for c in pinned_names(components)} == PINNED_KINDS & set(kinds.values())
    assert {component.kind for component in components if component.pin == "always"} <= {"A_log", "D"}
    assert all((component.kind in PINNED_KINDS) == (component.pin is not None) for component in components)


@every_model
@pytest.mark.parametrize("activations", SCHEMES)
def test_bytes_are_as_predicted_and_likelihoods_finite(name: str, activations: ActivationScheme) -> None:
    converter, windows = converter_of(name, activations), windows_of(name)
    for word, held in maps_of(name).items():
        converted = converter.convert(held)
        assert tensor_bytes(converted) == held.bytes(converter.components, activations), word
        assert not any(t.dtype == torch.float32 for t in [*converted.parameters(), *converted.buffers()]), word
        assert np.isfinite(evaluate(converted, windows).nll).all(), word


@every_model
def test_all_fp16_is_near_fp32_and_its_arrays_are_the_halves(name: str) -> None:
    model, windows, tensors = model_of(name), windows_of(name), checkpoint_of(name).tensors
    half = convert(model, PrecisionMap.uniform("fp16", find_components(model)), Scheme("none"))
    arrays = stored_arrays(half)
    assert arrays.keys() == tensors.keys()
    assert all(torch.equal(arrays[key], tensors[key].half()) for key in tensors)
    assert evaluate(half, windows).perplexity == pytest.approx(evaluate(model, windows).perplexity, rel=1e-2)


@every_model
def test_conversion_leaves_the_fp32_model_and_shares_no_memory_with_it(name: str) -> None:
    model = fp32_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    statistics = calibrate(model, windows_of(name, 48, seed=1))
    converted = convert(model, mixed(name, 2, lifted=True), Scheme("static"), statistics)
    evaluate(converted, windows_of(name, 2))
    ours = {t.untyped_storage().data_ptr() for t in [*converted.parameters(), *converted.buffers()]}
    assert not ours & {t.untyped_storage().data_ptr() for t in model.parameters()}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_model
def test_maps_in_one_pass_give_what_each_gives_alone(name: str) -> None:
    windows = windows_of(name, 2)
    for activations in SCHEMES:
        converter = converter_of(name, activations)
        maps = [maps_of(name)["int8"], mixed(name, 0), mixed(name, 5), mixed(name, 1, lifted=True)]
        found = evaluate_stacked(converter, maps, windows)
        for one, outcome in zip(maps, found, strict=True):
            assert isinstance(outcome, Evaluation)
            # inputs that are rounded to int8 amplify the rounding of float32
            np.testing.assert_allclose(
                outcome.nll, evaluate(converter.convert(one), windows).nll, rtol=1e-5 if activations == "none" else 2e-2
            )


@every_model
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_maps_in_one_pass_give_what_each_gives_alone(name: str, data: st.DataObject) -> None:
    converter, windows = converter_of(name, "none"), windows_of(name, 2)
    free = [c.name for c in converter.components if c.pin != "always"]
    base = PrecisionMap.uniform("fp16", converter.components)
    changes = st.dictionaries(st.sampled_from(free), st.sampled_from(CHOICES[1:]), max_size=4)
    maps = list(dict.fromkeys(base.changed(one) for one in data.draw(st.lists(changes, min_size=2, max_size=4))))
    for one, outcome in zip(maps, evaluate_stacked(converter, maps, windows), strict=True):
        assert isinstance(outcome, Evaluation)
        np.testing.assert_allclose(outcome.nll, evaluate(converter.convert(one), windows).nll, rtol=1e-5)
        assert tensor_bytes(converter.convert(one)) == one.bytes(converter.components, "none")


@every_model
def test_hidden_states_of_another_map_give_the_same(name: str) -> None:
    converter, windows, cache_ = converter_of(name, "static"), windows_of(name), PrefixCache(1 << 24)
    base = maps_of(name)["int8"]
    last = [c.name for c in converter.components if c.multiplies_inputs and c.layer is not None][-1]
    for held in (base, base.changed({last: "nf4"}), mixed(name, 3)):
        precisions = held.to_json()
        before = [
            tuple(precisions[c.name] for c in converter.components if c.stage <= layer)
            for layer in range(1, converter.model.config.n_layers)
        ]
        converted = converter.convert(held)
        shared = evaluate(converted, windows, prefixes=Prefixes(cache_, before))
        assert np.array_equal(shared.nll, evaluate(converted, windows).nll)
    assert cache_.reuse.reused > 0


@every_model
def test_an_artifact_is_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    converter, windows = converter_of(name, "static"), windows_of(name)
    held = mixed(name, 4, lifted=True)
    converted = converter.convert(held)
    save_artifact(tmp_path / "artifact", converted, held, converter.scheme, {})
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.precision_map == held
    assert artifact.tensor_bytes == held.bytes(converter.components, "static")
    assert artifact.model.config == converted.config
    assert np.array_equal(evaluate(artifact.model, windows).nll, evaluate(converted, windows).nll)
    ids = windows.ids[:2, :9]
    ours, theirs = prefill(converted, ids), prefill(artifact.model, ids)
    assert torch.equal(ours.logits, theirs.logits)
    one, other = open_decoder(converted, ours), open_decoder(artifact.model, theirs)
    for t in range(9, 14):
        assert torch.equal(one.step(windows.ids[:2, t]), other.step(windows.ids[:2, t]))


@every_model
def test_decoded_tokens_of_a_converted_model_are_those_of_whole_windows(name: str) -> None:
    converter, ids = converter_of(name, "none"), windows_of(name, 2).ids
    converted = converter.convert(mixed(name, 7, lifted=True))
    with torch.inference_mode():
        whole = converted(ids)
    standing = prefill(converted, ids[:, :5])
    for t in range(5, ids.shape[1]):
        assert off(standing.logits, whole[:, t - 1]) < 1e-4, t
        standing = step(converted, standing, ids[:, t])


@every_model
def test_text_is_made_and_drift_measured(name: str) -> None:
    model, windows = model_of(name), windows_of(name)
    converted = converter_of(name, "static").convert(maps_of(name)["int8"])
    made = generate(converted, windows.ids[:2, :6], 5)
    assert made.shape == (2, 11)
    assert torch.equal(made[:, :6], windows.ids[:2, :6])
    assert torch.equal(made, generate(converted, windows.ids[:2, :6], 5))
    found = drift(converted, model, windows, buckets=3)
    assert found.whole.log_mean == pytest.approx(
        np.mean((evaluate(converted, windows).nll - evaluate(model, windows).nll) / windows.predicted), abs=1e-6
    )
    assert found.whole.log_mean != 0.0
    assert len(found.buckets) == 3


@every_model
def test_a_copy_gives_the_same_and_is_apart(name: str) -> None:
    windows = windows_of(name, 2)
    for model in (fp32_of(name), converter_of(name, "static").convert(mixed(name, 8))):
        expected = evaluate(model, windows).nll
        copied = copy.deepcopy(model)
        assert np.array_equal(evaluate(copied, windows).nll, expected)
        with torch.no_grad():
            for array in stored_arrays(copied).values():
                array.zero_()
        assert np.array_equal(evaluate(model, windows).nll, expected)


@every_model
def test_a_window_counts_the_same_whatever_else_is_evaluated(name: str) -> None:
    model, windows = model_of(name), windows_of(name, 7)
    expected = evaluate(model, windows).nll
    alone = [evaluate(model, Windows(windows.ids[w : w + 1])).nll[0] for w in range(7)]
    reversed_ = evaluate(model, Windows(windows.ids.flip(0))).nll[::-1]
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    np.testing.assert_allclose(reversed_, expected, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_an_embedding_in_blocks_is_counted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    from ssm_mp.conversion.embedding_blocks import split_embedding

    model, windows = model_of(name), windows_of(name)
    counts = torch.bincount(windows.ids.flatten(), minlength=model.config.vocabulary)
    blocked = split_embedding(model, counts, [7, 30])
    np.testing.assert_allclose(evaluate(blocked, windows).nll, evaluate(model, windows).nll, rtol=1e-5)
    components = find_components(blocked)
    rules = {"*": "int8", "embedding.blocks.0": "fp16", "embedding.blocks.2": "nf4"}
    held = PrecisionMap.from_rules(rules, components)
    converted = convert(blocked, held, Scheme("dynamic"))
    save_artifact(tmp_path / "artifact", converted, held, Scheme("dynamic"), {})
    assert tensor_bytes(converted) == held.bytes(components, "dynamic")
    again = load_artifact(tmp_path / "artifact")
    assert np.array_equal(evaluate(again, windows).nll, evaluate(converted, windows).nll)
