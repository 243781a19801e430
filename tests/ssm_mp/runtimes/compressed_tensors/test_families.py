"""Every family in a packed folder: weights equal bit for bit, and transformers' logits those of dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_mp.conversion.regroup import regrouped
from ssm_mp.runtimes.compressed_tensors.format import COMPRESSED_TENSORS
from ssm_mp.runtimes.compressed_tensors.run import main as reader
from ssm_mp.runtimes.exportable import twin
from tests.families.models import checkpoint_of as tiny_of
from tests.ssm_mp.runtimes.checking import TWIN, ids_of, item_of, mixed_rules
from tests.ssm_mp.runtimes.folders import CASES, VOCABULARY, answered, checkpoint_of, divergence, require_true_folder

HELD = [name for name in CASES if COMPRESSED_TENSORS.refusal(checkpoint_of(name).config) is None]
QUICK = ("bamba", "granite-experts", "nemotron_h", "qwen3_5_text")
every_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HELD]
)
IDS = ids_of(VOCABULARY)


def test_families_that_are_held() -> None:
    assert {name.split("-")[0] for name in HELD} == {
        "bamba", "granite", "falcon_h1", "nemotron_h", "lfm2", "qwen3_5_text"
    }  # fmt: skip


@every_family
def test_logits_are_those_of_transformers_on_dequantised_weights(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name)
    item = item_of(
        checkpoint, mixed_rules(COMPRESSED_TENSORS, checkpoint, "int8", "int5", "int4", "int3", "int6", "fp16")
    )
    require_true_folder(COMPRESSED_TENSORS, item, tmp_path / "packed")
    found = answered(reader, tmp_path / "packed", IDS, tmp_path)
    COMPRESSED_TENSORS.write(twin(item), tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (found == answered(reader, tmp_path / "plain", IDS, tmp_path)).all()
    mean, most = divergence(item, found, IDS)
    assert mean < 1e-6
    assert most < TWIN


@pytest.mark.parametrize("precision", ["int8", "int5", "int4"])
def test_pieces_of_in_proj_at_one_precision_are_one_layer(precision: str, tmp_path: Path) -> None:
    checkpoint = regrouped(checkpoint_of("granite-experts"), "each", ("in_proj",))
    assert "in_proj" in str(COMPRESSED_TENSORS.refusal(checkpoint.config))
    parts = [p.component for p in checkpoint.config.parameters() if ".in_proj." in p.name]
    item = item_of(checkpoint, {"*": "fp16", **dict.fromkeys(parts, precision)})
    require_true_folder(COMPRESSED_TENSORS, item, tmp_path / "model")
    mean, _ = divergence(item, answered(reader, tmp_path / "model", IDS, tmp_path), IDS)
    assert mean < 1e-6
    other = item_of(checkpoint, {"*": "fp16", **dict.fromkeys(parts, precision), parts[0]: "fp16"})
    assert "in_proj" in str(COMPRESSED_TENSORS.refusal_of(other))


def test_experts_that_are_a_component_each_are_no_obstacle() -> None:
    checkpoint = regrouped(checkpoint_of("granite-experts"), "each")
    assert COMPRESSED_TENSORS.refusal(checkpoint.config) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "initialisation"),
        ("mamba2/groups-2", "initialisation"),
        ("falcon_mamba/plain", "initialisation"),
        ("jamba/dense", "convert"),
        ("qwen3_next/plain", "convert"),
        ("nemotron_h/experts", "at random"),
        ("lfm2_moe/plain", "not compared"),
        ("qwen3_5_moe_text/plain", "not compared"),
        ("itera", "this project"),
    ],
)
def test_a_family_that_transformers_does_not_load(name: str, why: str) -> None:
    checkpoint = tiny_of(name)
    assert why in str(COMPRESSED_TENSORS.refusal(checkpoint.config))
    assert why in str(COMPRESSED_TENSORS.refusal_of(item_of(checkpoint, {"*": "fp16"})))


def test_the_reader_does_not_take_a_folder_that_lacks_a_tensor(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("granite")
    COMPRESSED_TENSORS.write(item_of(checkpoint, mixed_rules(COMPRESSED_TENSORS, checkpoint, "int8")), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("out_proj.weight_scale"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "m" / "model.safetensors")
    with pytest.raises((SystemExit, AttributeError), match="missing_keys|weight_scale"):
        answered(reader, tmp_path / "m", IDS, tmp_path)
    save_file({**tensors, "model.layers.0.stray.weight": torch.ones(2)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match="unexpected_keys"):
        answered(reader, tmp_path / "m", IDS, tmp_path)
