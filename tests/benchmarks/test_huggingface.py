"""The plain way means the same by a precision map as our conversion, and its checkpoint is a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.huggingface import plain_perplexity, transformers_model, write_reference
from search.problem.spec import load_spec
from search.problem.splits import load_splits
from ssm_mp import load_model
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import HUGGING_FACE, some_windows

pytest.importorskip("transformers")
STUDY = Path(__file__).parents[2] / "studies" / "reference.toml"


@pytest.mark.parametrize("seed", range(4))
def test_the_plain_way_and_ours_find_the_same_perplexity(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = transformers_model(HUGGING_FACE)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    model, windows = load_model(tmp_path), some_windows()
    statistics, scheme = calibrate(model, windows), Scheme()
    converter = Converter(model, scheme, statistics)
    scales = {name: float(found.scale(scheme.input_scales)) for name, found in statistics.items()}
    lowest = PrecisionMap.uniform("int8", converter.components)
    changed = lowest.changed({name: "fp16" for name, _ in lowest if torch.rand(()) < 0.5})
    for precision_map in (lowest, changed):
        expected = evaluate(converter.convert(precision_map), windows).perplexity
        found = plain_perplexity(theirs, precision_map.to_json(), scales, windows)
        assert found == pytest.approx(expected, rel=1e-3)  # a value halfway between two integers may go either way


def test_the_plain_way_leaves_the_model_as_it_is() -> None:
    model = transformers_model(HUGGING_FACE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = some_windows(2)
    everywhere = {"embedding": "int8", "layers.0.ssm.in_proj": "int8", "layers.0.ssm.dt_proj": "int8"}
    plain_perplexity(model, everywhere, {"embedding": 0.1, "layers.0.ssm.dt_proj": 0.1}, ids)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_the_reference_in_a_hugging_face_folder_predicts_about_as_well(tmp_path: Path) -> None:
    theirs = write_reference(tmp_path)
    model, spec = load_model(tmp_path), load_spec(STUDY, ["data.window=128", "data.search_windows=8"])
    windows: Windows = load_splits(spec, model.config).search
    ours = evaluate(model, windows).perplexity
    assert 5 < ours < 60
    assert plain_perplexity(theirs, {}, {}, windows) == pytest.approx(ours, rel=1e-4)
