"""Folders as transformers writes them: whatever their form, they are read whole and without a doubt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.families.registry import FAMILIES
from tests.families.tiny_models import CASES, written
from tests.ssm_mp.families.folders import BY_NAME, require_equal

READ = {word for family in FAMILIES.values() for word in family.model_types}
FIRST = {case.family: case.name for case in reversed(CASES) if case.family in READ}


@pytest.mark.parametrize("name", [case.name for case in CASES if case.family in READ and "vision" not in case.name])
def test_what_transformers_wrote_gives_no_note(name: str, tmp_path: Path) -> None:
    folder = written(BY_NAME[name], tmp_path)
    assert (folder / "generation_config.json").exists()
    assert load_checkpoint(folder).notes == ()


@pytest.mark.parametrize("name", FIRST.values())
def test_shards_are_read_as_one_file(name: str, tmp_path: Path) -> None:
    whole = written(BY_NAME[name], tmp_path / "whole")
    shards = written(BY_NAME[name], tmp_path / "shards", shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    require_equal(load_checkpoint(shards), load_checkpoint(whole))


@pytest.mark.parametrize("name", FIRST.values())
def test_a_folder_in_bfloat16_is_the_rounded_model(name: str, tmp_path: Path) -> None:
    whole = load_checkpoint(written(BY_NAME[name], tmp_path / "whole"))
    short = load_checkpoint(written(BY_NAME[name], tmp_path / "short", dtype=torch.bfloat16))
    assert short.config == whole.config
    assert short.tensors.keys() == whole.tensors.keys()
    for key, tensor in short.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.tensors[key].bfloat16().float()), key


@pytest.mark.parametrize("name", FIRST.values())
def test_an_unknown_key_is_named(name: str, tmp_path: Path) -> None:
    folder = written(BY_NAME[name], tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"strange_option": 3,', 1))
    assert any("not used: strange_option" in note for note in load_checkpoint(folder).notes)
