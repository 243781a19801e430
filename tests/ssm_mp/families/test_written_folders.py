"""Folders as transformers writes them: whatever their form, they are read whole and without a doubt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from ssm_mp.families.registry import FAMILIES
from tests.families.tiny_models import CASES, written
from tests.ssm_mp.families.changed_folders import Tensors, changed, held
from tests.ssm_mp.families.folders import BY_NAME, require_equal

FAMILIES_OF = {word: family for family in FAMILIES.values() for word in family.model_types}
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
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole.tensors[key].bfloat16()), key


@pytest.mark.parametrize("name", FIRST.values())
def test_an_unknown_key_is_named(name: str, tmp_path: Path) -> None:
    folder = written(BY_NAME[name], tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"strange_option": 3,', 1))
    assert any("not used: strange_option" in note for note in load_checkpoint(folder).notes)


def is_kernel(tensor: Tensor) -> bool:
    return tensor.dim() == 3 and tensor.shape[1] == 1


@pytest.mark.parametrize("name", [name for name in FIRST.values() if any(map(is_kernel, held(name)[1].values()))])
def test_convolutions_as_mlx_keeps_them_are_turned_where_it_changes_nothing_else(name: str, tmp_path: Path) -> None:
    def turned(tensors: Tensors) -> Tensors:
        return {key: t.transpose(1, 2).contiguous() if is_kernel(t) else t for key, t in tensors.items()}

    folder = changed(name, tmp_path, tensors=turned)
    if not FAMILIES_OF[BY_NAME[name].family].plain_in_mlx:
        with pytest.raises(CheckpointError, match="conv"):
            load_checkpoint(folder)
        return
    found = load_checkpoint(folder)
    require_equal(found, load_checkpoint(written(BY_NAME[name], tmp_path / "whole")))
    assert any("stored as [I, K, 1]" in note for note in found.notes)
