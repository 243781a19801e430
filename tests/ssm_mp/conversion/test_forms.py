from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.forms import Forms, Scratch
from ssm_mp.conversion.regroup import has_experts, regrouped
from ssm_mp.errors import MachineError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.evaluation.memory import let_go_of
from ssm_mp.model import assemble, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.stored import FloatTensor
from ssm_mp.scheme import Scheme
from tests.families.models import MODELS, checkpoint_of
from tests.tiny import HUGGING_FACE, random_model, some_windows

ROOM = 1 << 30
PRECISIONS = ("fp16", "int8", "nf4", "int3")


def half(count: int) -> nn.Module:
    return FloatTensor(torch.ones(count, dtype=torch.float16))


def test_a_form_is_made_once_and_shared() -> None:
    forms = Forms()
    first = forms.get(("a", "fp16"), lambda: half(10))
    assert forms.get(("a", "fp16"), lambda: half(11)) is first
    assert ("a", "fp16") in forms
    assert ("a", "int8") not in forms


def test_what_was_used_the_longest_ago_goes_to_the_scratch_folder(tmp_path: Path) -> None:
    forms = Forms(25_000, Scratch(tmp_path, ROOM, least=1))
    made = {name: forms.get((name, "fp16"), lambda: half(5_000)) for name in ("a", "b")}
    forms.get(("a", "fp16"), lambda: half(1))
    forms.get(("c", "fp16"), lambda: half(5_000))
    assert (forms.held, forms.written) == (20_000, 10_000)
    forms.get(("d", "fp16"), lambda: half(5_000))
    assert (forms.held, forms.written) == (20_000, 20_000)
    assert all(bool((form.tensor() == 1).all()) for form in made.values())  # type: ignore[operator]


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_of_spilled_forms_say_the_very_same(tmp_path: Path, precision: str, activations: str) -> None:
    model, windows = random_model(HUGGING_FACE), some_windows(6)
    scheme = Scheme(activations=activations)  # type: ignore[arg-type]
    everywhere = PrecisionMap.uniform(precision, find_components(model))
    expected = Converter(model, scheme).convert(everywhere)
    forms = Forms(0, Scratch(tmp_path, ROOM, least=1))
    found = Converter(model, scheme, forms=forms).convert(everywhere)
    assert forms.held == 0
    assert forms.written > 0
    assert (evaluate(found, windows).nll == evaluate(expected, windows).nll).all()


def test_a_model_that_has_run_goes_on_with_the_same_numbers_when_its_forms_give_way(tmp_path: Path) -> None:
    model, windows = random_model(HUGGING_FACE), some_windows(6)
    components = find_components(model)
    forms = Forms(1 << 14, Scratch(tmp_path, ROOM, least=1))
    converter = Converter(model, Scheme(activations="none"), forms=forms)
    first = converter.convert(PrecisionMap.uniform("int8", components))
    expected = evaluate(first, windows).nll
    converter.convert(PrecisionMap.uniform("fp16", components))
    assert forms.written > 0
    assert (evaluate(first, windows).nll == expected).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_that_waits_keeps_no_tensor_that_has_given_way(tmp_path: Path, precision: str) -> None:
    config, windows = HUGGING_FACE, some_windows(6)
    source = random_model(config)
    model = assemble(config, source._components, after_layer=let_go_of)
    forms = Forms(ROOM, Scratch(tmp_path, ROOM, least=1))
    converter = Converter(model, Scheme(activations="none"), forms=forms)
    waiting = converter.convert(PrecisionMap.uniform(precision, find_components(model)))
    expected = evaluate(waiting, windows).nll
    components = (waiting.component(f"layers.0.ssm.{name}") for name in ("in_proj", "x_proj", "out_proj"))
    held = [StorageWeakRef(t.untyped_storage()) for c in components for t in c.weight.arrays().values()]  # type: ignore[operator, union-attr]
    forms._capacity = 0
    forms.get(("another", "fp16"), lambda: half(10))
    assert all(storage.expired() for storage in held)
    assert (evaluate(waiting, windows).nll == expected).all()


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" in name][:3])
def test_experts_in_one_component_survive_it_too(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(name)
    if has_experts(checkpoint.config):
        checkpoint = regrouped(checkpoint, "together")
    model = build(checkpoint.config, checkpoint.tensors)
    everywhere = PrecisionMap.uniform("int8", find_components(model))
    ids = torch.arange(8)[None] % checkpoint.config.vocabulary
    with torch.inference_mode():
        expected = Converter(model, Scheme(activations="none")).convert(everywhere)(ids)
        forms = Forms(0, Scratch(tmp_path, ROOM, least=1))
        found = Converter(model, Scheme(activations="none"), forms=forms).convert(everywhere)
        assert torch.equal(found(ids), expected)


def test_a_scratch_folder_that_may_not_take_more_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    forms = Forms(0, Scratch(tmp_path, 15_000))
    forms.get(("a", "fp16"), lambda: half(5_000))
    with pytest.raises(MachineError, match=r"scratch folder may; give another with \[search\] scratch"):
        forms.get(("b", "fp16"), lambda: half(5_000))


def test_a_scratch_folder_that_goes_away_is_one_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    forms = Forms(0, Scratch(folder, ROOM))
    folder.rmdir()
    with pytest.raises(MachineError, match="gone: a quantised component could not be written"):
        forms.get(("a", "fp16"), lambda: half(5_000))
