from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssm_mp.artifact import MAP, METRICS, TENSORS, load_artifact, read_artifact, save_artifact, tensor_bytes
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import LanguageModel
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.groups import CodeBook
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.scheme import ActivationScheme, ScaleRule, Scheme
from tests.tiny import CONFIGS, MAMBA, random_model, some_windows


def mixed(model: LanguageModel) -> PrecisionMap:
    """Every other free component int8."""
    components = find_components(model)
    free = [c.name for c in components if c.pin is None]
    return PrecisionMap.uniform("fp16", components).changed(dict.fromkeys(free[::2], "int8"))


def saved(folder: Path, family: str = "mamba", activations: ActivationScheme = "static") -> tuple[LanguageModel, Path]:
    model = random_model(CONFIGS[family])
    scheme = Scheme(activations)
    converted = convert(model, mixed(model), scheme, calibrate(model, some_windows()))
    return converted, save_artifact(folder / "artifact", converted, mixed(model), scheme, {"perplexity": 1.0})


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_save_load_evaluate_agrees_exactly(tmp_path: Path, family: str, activations: ActivationScheme) -> None:
    converted, path = saved(tmp_path, family, activations)
    found = read_artifact(path)
    assert np.array_equal(evaluate(found.model, some_windows()).nll, evaluate(converted, some_windows()).nll)
    assert found.precision_map == mixed(random_model(CONFIGS[family]))
    assert found.scheme.activations == activations
    assert found.metrics["perplexity"] == 1.0


@pytest.mark.parametrize("family", CONFIGS)
def test_predicted_bytes_equal_the_bytes_on_disk_but_for_the_header(tmp_path: Path, family: str) -> None:
    converted, path = saved(tmp_path, family)
    model = random_model(CONFIGS[family])
    predicted = mixed(model).bytes(find_components(model), "static")
    file = (path / TENSORS).read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert len(file) - header == predicted == tensor_bytes(converted)
    metrics = json.loads((path / METRICS).read_text())
    assert (metrics["bytes"], metrics["file_bytes"]) == (predicted, len(file))


def test_int8_tensors_are_int8_in_the_file(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    chosen = mixed(random_model(MAMBA))
    arrays = load_file(path / TENSORS)
    for name, precision in chosen:
        weight = [key for key in arrays if key.startswith(f"{name}.") and key.endswith((".q", ".weight"))]
        if precision == "int8":
            assert arrays[f"{name}.weight.q"].dtype == torch.int8, weight
        else:
            assert f"{name}.weight.q" not in arrays
    assert not any(array.dtype == torch.float32 for array in arrays.values())
    with safe_open(path / TENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "ssm-mp/1"


def test_int3_as_version_0_4_wrote_it_loads_with_the_values_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scheme = random_model(MAMBA), Scheme("none", ScaleRule("mse"))
    seven = CodeBook(3, (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
    chosen = PrecisionMap.uniform("int3", find_components(model))
    with monkeypatch.context() as before:
        before.setattr(PRECISIONS["int3"], "book", seven)
        converted = convert(model, chosen, scheme)
        path = save_artifact(tmp_path / "artifact", converted, chosen, scheme, {})
    arrays, found = load_file(path / TENSORS), load_artifact(path)
    checked = 0
    for component in find_components(model):
        for parameter in component.parameters:
            packed = arrays.get(f"{parameter.name}.q")
            if packed is None:
                continue
            bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, 3)
            codes = bits @ np.array([1, 2, 4])
            assert codes.max() <= 6
            values = (codes - 3.0) * arrays[f"{parameter.name}.scale"].numpy().astype(np.float32)[:, None]
            held = held_by(found.component(component.name), parameter.leaf).tensor()
            assert np.array_equal(held.numpy().flatten(), values.astype(np.float32).flatten()[: held.numel()])
            checked += 1
    assert checked >= 6
    assert np.array_equal(evaluate(found, some_windows()).nll, evaluate(converted, some_windows()).nll)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    content = bytearray((path / TENSORS).read_bytes())
    content[-1] ^= 1
    (path / TENSORS).write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        read_artifact(path)


@pytest.mark.parametrize("key", ["map", "scheme", "pins"])
def test_a_changed_map_or_scheme_is_refused(tmp_path: Path, key: str) -> None:
    _, path = saved(tmp_path)
    content = json.loads((path / MAP).read_text())
    if key == "map":
        other = {"int8": "fp16", "fp16": "int8"}[content["map"]["layers.0.ssm.in_proj"]]
        content["map"]["layers.0.ssm.in_proj"] = other
    elif key == "scheme":
        content["scheme"]["activations"] = "dynamic"
    else:
        content["pins"] = ["norm"]
    (path / MAP).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"its {key} is not what model.safetensors was made with"):
        read_artifact(path)


def test_arrays_that_do_not_fit_the_map_are_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    arrays = load_file(path / TENSORS)
    with safe_open(path / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    arrays["embedding.weight.q"] = arrays["embedding.weight.q"][:-1].contiguous()
    save_file(arrays, path / TENSORS, metadata=metadata)
    content = json.loads((path / MAP).read_text())
    content["checksum"] = f"sha256:{hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()}"
    (path / MAP).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"embedding.weight.q: expected int8 \[64, 16\], found int8 \[63, 16\]"):
        read_artifact(path)


@pytest.mark.parametrize("change", ["format", "no map", "not json", "no tensors", "unknown precision"])
def test_foreign_folders_are_refused(tmp_path: Path, change: str) -> None:
    _, path = saved(tmp_path)
    content = json.loads((path / MAP).read_text())
    if change == "format":
        (path / MAP).write_text(json.dumps({**content, "format": "other/9"}))
    elif change == "no map":
        (path / MAP).unlink()
    elif change == "not json":
        (path / MAP).write_text("{")
    elif change == "no tensors":
        (path / TENSORS).unlink()
    else:
        (path / MAP).write_text(json.dumps({**content, "map": {**content["map"], "embedding": "int7"}}))
    with pytest.raises(ArtifactError, match="artifact"):
        read_artifact(path)


def test_what_is_in_the_way_is_kept_unless_it_is_an_artifact_to_replace(tmp_path: Path) -> None:
    converted, path = saved(tmp_path)
    model = random_model(MAMBA)
    with pytest.raises(ArtifactError, match="already exists.*--force"):
        save_artifact(path, converted, mixed(model), Scheme(), {})
    save_artifact(path, converted, mixed(model), Scheme(), {"perplexity": 2.0}, replace=True)
    assert read_artifact(path).metrics["perplexity"] == 2.0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="already exists"):
        save_artifact(precious, converted, mixed(model), Scheme(), {}, replace=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["artifact", "precious"]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = random_model(MAMBA)
    converted = convert(model, mixed(model), Scheme("none"))
    monkeypatch.setattr("ssm_mp.artifact._write_json", full)
    with pytest.raises(ArtifactError, match="No space left on device.*nothing was left behind"):
        save_artifact(tmp_path / "artifact", converted, mixed(model), Scheme("none"), {})
    assert os.listdir(tmp_path) == []


def test_a_failed_replacement_keeps_the_former_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted, path = saved(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        save_artifact(path, converted, mixed(random_model(MAMBA)), Scheme(), {"perplexity": 2.0}, replace=True)
    assert read_artifact(path).metrics["perplexity"] == 1.0
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_saved_file_is_readable_by_safetensors_alone(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    arrays = load_file(path / TENSORS)
    save_file(arrays, tmp_path / "again.safetensors")
    assert arrays.keys() == load_file(tmp_path / "again.safetensors").keys()
