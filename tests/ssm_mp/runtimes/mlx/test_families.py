"""Every family in an MLX folder: weights equal bit for bit, bytes as predicted, and mlx-lm's distributions ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.conversion.regroup import regrouped
from ssm_mp.runtimes.exportable import twin
from ssm_mp.runtimes.mlx.format import MLX
from tests.ssm_mp.runtimes.checking import TWIN, ids_of, item_of, mixed_rules
from tests.ssm_mp.runtimes.folders import CASES, VOCABULARY, answered, checkpoint_of, divergence, require_true_folder

reader = pytest.importorskip("ssm_mp.runtimes.mlx.run").main
HELD = [name for name in CASES if name != "bamba"]
QUICK = ("mamba2", "granite-experts", "falcon_h1", "lfm2_moe", "qwen3_next", "nemotron_h-latent")
every_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HELD]
)
IDS = ids_of(VOCABULARY)


@every_family
def test_a_mixed_map_is_held_and_computed(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name)
    item = item_of(checkpoint, mixed_rules(MLX, checkpoint, "int8", "int4", "int6", "int3", "int5", "fp16"))
    require_true_folder(MLX, item, tmp_path / "model")
    mean, _ = divergence(item, answered(reader, tmp_path / "model", IDS, tmp_path), IDS)
    assert mean < 1e-6


@every_family
def test_the_float32_twin_is_computed(name: str, tmp_path: Path) -> None:
    item = twin(item_of(checkpoint_of(name), {"*": "fp16"}))
    require_true_folder(MLX, item, tmp_path / "model")
    mean, most = divergence(item, answered(reader, tmp_path / "model", IDS, tmp_path), IDS)
    assert mean < 1e-6
    assert most < TWIN


@pytest.mark.parametrize("precision", ["int8", "int6", "int5", "int4", "int3", "fp16"])
def test_pieces_and_experts_at_one_precision_are_one_tensor(precision: str, tmp_path: Path) -> None:
    checkpoint = regrouped(checkpoint_of("granite-experts"), "each", ("in_proj",))
    assert MLX.refusal(checkpoint.config) is not None
    parts = [p.component for p in checkpoint.config.parameters() if ".experts." in p.name or ".in_proj." in p.name]
    item = item_of(checkpoint, {"*": "fp16", **dict.fromkeys(parts, precision)})
    require_true_folder(MLX, item, tmp_path / "model")
    mean, _ = divergence(item, answered(reader, tmp_path / "model", IDS, tmp_path), IDS)
    assert mean < 1e-6
    other = item_of(checkpoint, {"*": "fp16", **dict.fromkeys(parts, precision), parts[0]: "int8"})
    assert (MLX.refusal_of(other) is None) is (precision == "int8")


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_multipliers_of_falcon_h1_are_in_the_weights(precision: str, tmp_path: Path) -> None:
    checkpoint = regrouped(checkpoint_of("falcon_h1"), None, ("in_proj",))
    parts = [p.component for p in checkpoint.config.parameters() if "_proj" in p.name]
    item = item_of(checkpoint, {"*": "fp16", **dict.fromkeys(parts, precision)})
    require_true_folder(MLX, item, tmp_path / "model")
    mean, most = divergence(item, answered(reader, tmp_path / "model", IDS, tmp_path), IDS)
    assert mean < 1e-6
    assert most < 3e-4
    scaled = next(part for part in item.components if part.name.endswith("k_proj"))
    encoding = MLX.encoding(scaled, precision, item.config)
    assert encoding is not None
    assert "multipliers" in encoding.note
