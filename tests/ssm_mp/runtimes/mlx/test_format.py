"""The hybrid reference as an MLX folder, by mlx-lm in a process of its own, and with the user's next command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.conversion.regroup import regrouped
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.mlx.format import MLX
from ssm_mp.runtimes.verify import unequal_weights
from tests.ssm_mp.runtimes.checking import checked, item_of, mixed_rules
from tests.ssm_mp.runtimes.folders import checkpoint_of

pytest.importorskip("mlx_lm")
HYBRID = Path(__file__).parents[4] / "studies" / "hybrid"


def hybrid() -> Checkpoint:
    return regrouped(load_checkpoint(HYBRID), "together")


def test_the_hybrid_reference_is_confirmed_by_mlx_lm(tmp_path: Path) -> None:
    checkpoint = hybrid()
    rules = mixed_rules(MLX, checkpoint, "int4", "int8", "int3")
    done = checked(MLX, item_of(checkpoint, rules, (HYBRID / "tokenizer.json").read_bytes()), tmp_path)
    assert done.verdict is not None
    assert done.verdict.mean_kl < 1e-6
    assert done.command.startswith("mlx_lm.generate --model ")


@pytest.mark.slow
def test_the_next_command_writes_a_text(tmp_path: Path) -> None:
    checkpoint = hybrid()
    item = item_of(checkpoint, mixed_rules(MLX, checkpoint, "int8"), (HYBRID / "tokenizer.json").read_bytes())
    MLX.write(item, tmp_path / "model")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "model")]
    done = subprocess.run(
        [*command, "--prompt", "def ", "--max-tokens", "8", "--temp", "0"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Generation: " in done.stdout


def test_a_changed_code_scale_or_norm_is_found(tmp_path: Path) -> None:
    item = item_of(checkpoint_of("granite"), {"*": "int4"} | fp16_for(checkpoint_of("granite")))
    for ending in ("in_proj.weight", "in_proj.scales", "in_proj.biases", "input_layernorm.weight"):
        folder = tmp_path / ending
        MLX.write(item, folder)
        assert unequal_weights(MLX, item, folder) == []
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith(ending))
        changed = tensors[name].clone()
        changed.view(torch.uint8).flatten()[2:3] ^= 1
        save_file({**tensors, name: changed}, folder / "model.safetensors")
        problems = unequal_weights(MLX, item, folder)
        assert len(problems) == 1
        assert problems[0].startswith(name.rpartition(".")[0])


def fp16_for(checkpoint: Checkpoint) -> dict[str, str]:
    """fp16 for what is no matrix of integers."""
    rules = mixed_rules(MLX, checkpoint, "int4")
    return dict.fromkeys({p.component for p in checkpoint.config.parameters()} - rules.keys(), "fp16")


def test_a_row_with_one_scale_takes_the_largest_groups_that_fit() -> None:
    found = {}
    for name, ending in (("mamba", "x_proj"), ("mamba", "in_proj"), ("falcon_h1", "mamba.out_proj")):
        checkpoint = checkpoint_of(name)
        part = next(p for p in item_of(checkpoint, {"*": "fp16"}).components if p.name.endswith(ending))
        encoding = MLX.encoding(part, "int8", checkpoint.config)
        assert encoding is not None
        found[ending] = encoding.word
    assert found == {
        "x_proj": "8 bits, groups of 64", "in_proj": "8 bits, groups of 32", "mamba.out_proj": "8 bits, groups of 128",
    }  # fmt: skip


def test_config_names_every_packed_module_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("qwen3_5_text")
    item = item_of(checkpoint, mixed_rules(MLX, checkpoint, "int8", "fp16"))
    MLX.write(item, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    packed = {name.removesuffix(".scales") for name in load_file(tmp_path / "model" / "model.safetensors")} & {
        key for key, value in config["quantization"].items() if isinstance(value, dict)
    }
    assert packed == {key for key, value in config["quantization"].items() if isinstance(value, dict)}
    assert config["quantization"] == config["quantization_config"]
    assert config["model_type"] == "qwen3_5"
    assert config["text_config"]["full_attention_interval"] == 2


def test_without_integers_nothing_is_said_of_packing(tmp_path: Path) -> None:
    item = Exportable("plain", item_of(checkpoint_of("lfm2"), {"*": "fp16"}).model, None)
    MLX.write(item, tmp_path / "model")
    assert "quantization" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert not (tmp_path / "model" / "tokenizer.json").exists()
