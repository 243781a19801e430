from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from ssm_mp.families.registry import FAMILIES, NOT_SUPPORTED
from tests.ssm_mp.families.changed_folders import changed
from tests.tiny import HUGGING_FACE, in_layout, random_tensors

WIDTH = {"vocab_size": 64, "hidden_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "zamba2": (
        "Zamba2",
        {
            **HEADS, "num_hidden_layers": 3, "n_mamba_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16,
            "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1, "attention_head_dim": 16,
            "attention_hidden_size": 64, "adapter_rank": 4,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "lru_width": 32},
    ),
    "rwkv": (
        "Rwkv",
        {"num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 40, "context_length": 16},
    ),
    "xlstm": ("xLSTM", {"num_hidden_layers": 2, "num_heads": 2}),
    "olmo_hybrid": ("OlmoHybrid", {**HEADS, **DELTA, **SPECIAL, "num_hidden_layers": 4}),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**HEADS, "num_hidden_layers": 1}),
    "gpt2": ("GPT2", {**SPECIAL, "num_hidden_layers": 1, "num_attention_heads": 4}),
}
SUPPORTED = "supported are mamba, .*mamba2, "


def folder_of(kind: str, options: dict[str, Any], folder: Path) -> Path:
    """What transformers writes of a tiny model."""
    config = getattr(transformers, f"{kind}Config")(**WIDTH, **options)
    model: Any = transformers.AutoModelForCausalLM
    model.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", NAMED)
def test_a_known_family_that_is_not_supported_is_named(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type = '{model_type}': known, but not supported; {SUPPORTED}"):
        load_checkpoint(folder_of(*NAMED[model_type], tmp_path))


@pytest.mark.parametrize("model_type", OTHERS)
def test_an_unknown_family_is_named(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type = '{model_type}': no known family's; {SUPPORTED}"):
        load_checkpoint(folder_of(*OTHERS[model_type], tmp_path))


@pytest.mark.parametrize("model_type", sorted(NOT_SUPPORTED))
@pytest.mark.parametrize("names", ["of Mamba", "of nobody"])
def test_a_type_is_refused_whatever_its_tensors_are_called(tmp_path: Path, model_type: str, names: str) -> None:
    tensors = in_layout(random_tensors(HUGGING_FACE), "huggingface")
    save_file(tensors if names == "of Mamba" else {"a.b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"model_type = '{model_type}': known, but not supported"):
        load_checkpoint(tmp_path)


def test_no_type_is_both_supported_and_refused() -> None:
    assert not NOT_SUPPORTED & {word for family in FAMILIES.values() for word in family.model_types}


@pytest.mark.parametrize("said", ["llama", "bamba", "qwen3_next"])
def test_tensors_of_another_family_than_said_are_refused(tmp_path: Path, said: str) -> None:
    expected = f"model_type = '{said}', but these tensors are of family 'lfm2', whose model type is 'lfm2'"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_checkpoint(changed("lfm2/plain", tmp_path, {"model_type": said}))


@pytest.mark.parametrize("said", [["lfm2"], {"lfm2": 1}, 7])
def test_a_model_type_that_is_no_word_is_one_error(tmp_path: Path, said: Any) -> None:
    with pytest.raises(CheckpointError, match="says model_type = "):
        load_checkpoint(changed("lfm2/plain", tmp_path, {"model_type": said}))
