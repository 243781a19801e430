"""Folders as transformers writes them: the same names and shapes, and a config from which the same model is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoTokenizer

from ssm_mp.blocks.block import Block
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.config import Config
from ssm_mp.conversion.regroup import regrouped, same_model
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.huggingface import divided, held, in_family, mixed, stacked, whole_name, wholes, write_beside
from ssm_mp.runtimes.huggingface_config import UNLIMITED, huggingface_config
from tests.ssm_mp.runtimes.checking import item_of
from tests.ssm_mp.runtimes.folders import CASES, checkpoint_of, written_by_transformers

FAMILIES = [name for name in CASES if name not in ("qwen3_5_moe_text",)]


def plain_folder(item: Exportable, folder: Path) -> Path:
    """Everything float, one expert's tensor after another as most families have them, and the config from scratch."""
    stored, tensors = item.stored(), {}
    for whole in wholes(item.config):
        value, name = held(whole, stored), in_family(item.config, whole.name)
        assert isinstance(value, torch.Tensor)
        if whole.experts is None:
            tensors[name] = value
        elif item.config.family == "granitemoehybrid":
            tensors[name.replace(".experts.", ".")] = stacked(whole, value)
        else:
            parts = value.chunk(whole.experts)
            tensors |= {name.replace(".experts.", f".experts.{e}."): part for e, part in enumerate(parts)}
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_beside(folder, huggingface_config(item.config, {}), item)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = load_file(written_by_transformers(name, tmp_path / "theirs") / "model.safetensors")
    ours = load_file(plain_folder(item_of(checkpoint_of(name), {"*": "fp16"}), tmp_path / "ours") / "model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_model_is_read_from_a_config_made_without_the_original(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name)
    folder = plain_folder(item_of(checkpoint, {"*": "fp16"}), tmp_path / "model")
    assert same_model(finite(load_checkpoint(folder).config), finite(checkpoint.config))
    assert AutoConfig.from_pretrained(folder).model_type == checkpoint.family


def finite(config: Config) -> Config:
    """Without the limit of steps that stands for none."""

    def changed(block: Block) -> Block:
        if isinstance(block, Mamba2) and block.dt_limits[1] == UNLIMITED:
            return replace(block, dt_limits=(block.dt_limits[0], None))
        return block

    return config.rebuilt(changed)


def test_keys_of_the_original_stay_and_those_of_another_file_do_not() -> None:
    config = checkpoint_of("granite").config
    source = {"model_type": "granitemoehybrid", "eos_token_id": 7, "router_aux_loss_coef": 0.5, "hidden_size": 1}
    found = huggingface_config(config, source)
    assert found["router_aux_loss_coef"] == 0.5
    assert found["hidden_size"] == 96
    assert found["layer_types"] == ["mamba", "attention", "mamba"]
    original = {"d_model": 96, "ssm_cfg": {"layer": "Mamba2"}, "eos_token_id": 7}
    found = huggingface_config(checkpoint_of("mamba2").config, original)
    assert found["model_type"] == "mamba2"
    assert found["eos_token_id"] == 7
    assert "ssm_cfg" not in found


def test_what_json_has_no_word_for_is_left_out_of_a_pickled_config() -> None:
    source = {"model_type": "granitemoehybrid", "stated_type": torch.float16, "kept": [1, None]}
    found = huggingface_config(checkpoint_of("granite").config, source)
    assert json.loads(json.dumps(found)) == found
    assert found["kept"] == [1, None]


def test_the_language_model_is_taken_out_of_a_config_for_text_and_vision() -> None:
    config = checkpoint_of("qwen3_5_text").config
    inside = {"model_type": "qwen3_5_text", "eos_token_id": 5}
    found = huggingface_config(config, {"model_type": "qwen3_5", "vision_config": {}, "text_config": inside})
    assert found["model_type"] == "qwen3_5_text"
    assert found["eos_token_id"] == 5
    assert not [key for key in found if key.endswith("_config")]


def test_components_of_one_tensor_must_have_one_precision() -> None:
    checkpoint = regrouped(checkpoint_of("granite-experts"), "each", ("in_proj",))
    assert "experts = 'together'" in str(divided(checkpoint.config))
    assert "split" in str(divided(checkpoint.config))
    assert "experts" not in str(divided(checkpoint.config, experts=False))
    assert divided(checkpoint_of("granite-experts").config) is None
    name = next(p.component for p in checkpoint.config.parameters() if ".experts.2." in p.name)
    assert mixed(item_of(checkpoint, {"*": "fp16"})) is None
    said = str(mixed(item_of(checkpoint, {"*": "fp16", name: "int8"})))
    assert whole_name(name) in said
    assert "fp16 and int8" in said


def test_tokenizer_and_files_travel_and_transformers_opens_them(tmp_path: Path) -> None:
    words = {"<end>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    tokenizer.add_special_tokens(["<end>"])
    files = {"generation_config.json": b"{}", "../outside": b"no", "config.json": b"no"}
    item = item_of(checkpoint_of("granite"), {"*": "fp16"}, tokenizer.to_str().encode())
    item = Exportable(item.name, item.model, item.precision_map, {}, item.tokenizer, files)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    write_beside(folder, {"eos_token_id": [0, 5], "model_type": "granitemoehybrid"}, item)
    assert not (tmp_path / "outside").exists()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, 5]
    assert (folder / "generation_config.json").read_bytes() == b"{}"
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened.eos_token == "<end>"
    assert opened.encode("a") == [1]
