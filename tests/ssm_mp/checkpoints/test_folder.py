from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.errors import CheckpointError
from tests.ssm_mp.files.written import hugging_face, write, write_index, write_shards
from tests.tiny import MAMBA, random_model


def seed_of(found: Checkpoint) -> int:
    """Which of the tests' checkpoints was read."""
    held = found.tensors["embedding.weight"]
    return next(seed for seed in range(9) if torch.equal(held, hugging_face(seed)["backbone.embeddings.weight"]))


def test_a_whole_file_beside_a_stale_index_is_read_and_the_index_noted(tmp_path: Path) -> None:
    save_file(hugging_face(0), tmp_path / "model.safetensors")
    write_shards(tmp_path, hugging_face(1))
    found = load_checkpoint(tmp_path)
    assert seed_of(found) == 0
    assert "not read: model.safetensors.index.json" in found.notes[0]


@pytest.mark.slow
def test_what_is_read_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    write(tmp_path / "pytorch_model.bin", hugging_face(0))
    write_shards(tmp_path, hugging_face(1))
    write_shards(tmp_path, hugging_face(2), "pytorch_model", ".bin")
    write(tmp_path / "model.safetensors", hugging_face(3))
    kept = []
    for first in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        model = MambaForCausalLM.from_pretrained(tmp_path, config=MambaConfig.from_pretrained(tmp_path))
        found = load_checkpoint(tmp_path)
        assert torch.equal(model.backbone.embeddings.weight.detach(), found.tensors["embedding.weight"])
        kept.append(seed_of(found))
        (tmp_path / first).unlink()
    assert kept == [3, 1, 0, 2]


@pytest.mark.parametrize("name", ["model.pt", "last.ckpt", "consolidated.safetensors", "weights.pth"])
def test_the_only_weights_of_a_folder_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, hugging_face())
    write(tmp_path / "optimizer.pt", {"state": {0: torch.zeros(3)}})
    write(tmp_path / "vocabulary.bin", {"ids": torch.zeros(3)})
    assert seed_of(load_checkpoint(tmp_path)) == 0


def test_two_sets_that_differ_without_a_rule_are_refused_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", hugging_face(0))
    write(tmp_path / "b.safetensors", hugging_face(1))
    with pytest.raises(CheckpointError, match=r"differ, a\.ckpt and b\.safetensors"):
        load_checkpoint(tmp_path)
    write(tmp_path / "b.safetensors", hugging_face(0))
    assert "not read: b.safetensors" in load_checkpoint(tmp_path).notes[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_by_index_by_folder_and_by_their_own_numbers(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    write_shards(tmp_path, hugging_face(), stem, suffix)
    index = tmp_path / f"{stem}{suffix}.index.json"
    assert seed_of(load_checkpoint(tmp_path)) == seed_of(load_checkpoint(index)) == 0
    with pytest.raises(CheckpointError, match=f"one of 2 shards of a checkpoint; give {index.name}"):
        load_checkpoint(tmp_path / f"{stem}-00001-of-00002{suffix}")
    index.unlink()
    assert "no index beside the 2 shards" in load_checkpoint(tmp_path).notes[0]
    (tmp_path / f"{stem}-00002-of-00002{suffix}").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*which is not there"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "", ".", "..", "a\0b", 3, None, "x" * 5000])
def test_an_index_that_leads_out_of_its_folder_or_nowhere_is_refused(tmp_path: Path, name: object) -> None:
    placed = write_shards(tmp_path, hugging_face())
    write_index(tmp_path, {**placed, "backbone.norm_f.weight": name})
    with pytest.raises(CheckpointError, match="weight_map: expected|which is not there"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "", "[" * 100_000])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        load_checkpoint(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    placed = write_shards(tmp_path, hugging_face())
    first, second = sorted(set(placed.values()))
    write_index(tmp_path, {**placed, "gone": first})
    with pytest.raises(CheckpointError, match=rf"tensors that their shards lack: gone \({first}\)"):
        load_checkpoint(tmp_path)
    write_index(tmp_path, {**placed, "backbone.embeddings.weight": second})
    assert "puts into other shards" in load_checkpoint(tmp_path).notes[0]
    write_index(tmp_path, {name: shard for name, shard in placed.items() if name != "backbone.norm_f.weight"})
    assert "does not name, but its shards hold: backbone.norm_f.weight" in load_checkpoint(tmp_path).notes[0]
    tensors = hugging_face()
    held = {name: tensors[name] for name, shard in placed.items() if shard == second}
    moved = "backbone.embeddings.weight"
    write_index(tmp_path, placed)
    write(tmp_path / second, {**held, moved: tensors[moved]})
    assert f"the same in two shards: {moved}" in load_checkpoint(tmp_path).notes[0]
    write(tmp_path / second, {**held, moved: tensors[moved] + 1})
    with pytest.raises(CheckpointError, match=f"{moved} has other values in {first} and {second}"):
        load_checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    placed = write_shards(tmp_path, hugging_face())
    first, second = sorted(set(placed.values()))
    index = tmp_path / "model.safetensors.index.json"
    name = "backbone.norm_f.weight"
    index.write_text(
        index.read_text().replace(f'"{name}": "{placed[name]}"', f'"{name}": "{first}", "{name}": "{second}"')
    )
    with pytest.raises(
        CheckpointError, match=rf"{index.name}: .*{name} is there twice, as '{first}' and as '{second}'"
    ):
        load_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    placed = write_shards(tmp_path, hugging_face())
    shard = tmp_path / max(placed.values())
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: not a readable"):
        load_checkpoint(tmp_path)


def cache(folder: Path, **config: Any) -> Path:
    """A snapshot of a Hugging Face cache: links to blobs without suffixes."""
    snapshot, blobs = folder / "snapshots" / "0f3a", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(hugging_face(), blobs / "5c1d")
    (blobs / "77aa").write_text(json.dumps(config))
    (snapshot / "model.safetensors").symlink_to("../../blobs/5c1d")
    (snapshot / "config.json").symlink_to("../../blobs/77aa")
    return snapshot


def test_a_link_in_a_cache_keeps_its_name_and_its_siblings(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, layer_norm_epsilon=0.25)
    for path in (snapshot, snapshot / "model.safetensors"):
        found = load_checkpoint(path)
        assert (found.path, found.config.final_norm.eps) == (path, 0.25)
    with pytest.raises(CheckpointError, match="it is a cache; give snapshots/0f3a"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "blobs" / "5c1d").config.final_norm.eps == 1e-5


def test_linked_shards_are_looked_for_beside_the_index_link(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    placed = write_shards(blobs, hugging_face())
    for i, name in enumerate([*sorted(set(placed.values())), "model.safetensors.index.json"]):
        (blobs / name).rename(blobs / f"{i}")
        (snapshot / name).symlink_to(f"../blobs/{i}")
    assert seed_of(load_checkpoint(snapshot)) == 0
    assert seed_of(load_checkpoint(snapshot / "model.safetensors.index.json")) == 0


def test_a_link_to_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    (tmp_path / "blobs" / "5c1d").unlink()
    for path in (snapshot, snapshot / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"a link to .*5c1d, which is not there"):
            load_checkpoint(path)


def test_an_artifact_is_no_checkpoint(tmp_path: Path) -> None:
    from ssm_mp.artifact import save_artifact
    from ssm_mp.components import find_components
    from ssm_mp.conversion.convert import convert
    from ssm_mp.precision_map import PrecisionMap
    from ssm_mp.scheme import Scheme

    model = random_model(MAMBA)
    uniform = PrecisionMap.uniform("fp16", find_components(model))
    save_artifact(tmp_path / "out", convert(model, uniform, Scheme("none")), uniform, Scheme("none"), {})
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        with pytest.raises(CheckpointError, match="an artifact of ssm-mp, already converted"):
            load_checkpoint(path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "absent.safetensors"])
def test_a_path_that_no_file_can_have_is_said_to_lead_nowhere(path: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path)
