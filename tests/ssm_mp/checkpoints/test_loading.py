from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.families.itera import IteraConfig
from ssm_mp.model import build
from tests.tiny import HUGGING_FACE, ITERA, MAMBA, in_layout, random_tensors

LAYOUTS: list[tuple[str, Config, tuple[str, ...], str]] = [
    ("mamba, Hugging Face", HUGGING_FACE, ("huggingface",), "huggingface"),
    ("mamba, original", HUGGING_FACE, ("original",), "original"),
    ("mamba, positions", MAMBA, ("positions",), "positions"),
    ("itera, canonical", ITERA, ("canonical",), "canonical"),
    ("itera, moe.moe", ITERA, ("moe.moe",), "moe.moe"),
    ("itera, old embeddings and norm", ITERA, ("positions",), "token_embeddings+norm_f"),
    ("itera, all old", ITERA, ("positions", "moe.moe"), "token_embeddings+norm_f+moe.moe"),
]


@pytest.mark.parametrize(("config", "layouts", "name"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
@pytest.mark.parametrize("wrapped", ["top", "model_state_dict", "state_dict", "safetensors"])
def test_every_layout_round_trips(
    tmp_path: Path, config: Config, layouts: tuple[str, ...], name: str, wrapped: str
) -> None:
    tensors = random_tensors(config)
    named = in_layout(tensors, *layouts)
    path = tmp_path / ("model.safetensors" if wrapped == "safetensors" else "model.pt")
    if wrapped == "safetensors":
        save_file(named, path)
    else:
        torch.save(named if wrapped == "top" else {wrapped: named, "step": 7}, path)
    found = load_checkpoint(path)
    assert found.layout == name
    assert found.config == config
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("config", [MAMBA, ITERA], ids=["mamba", "itera"])
def test_a_tied_head_is_dropped_and_another_head_kept(tmp_path: Path, config: Config) -> None:
    tensors = random_tensors(config)
    tied = {**tensors, "lm_head.weight": tensors["embedding.weight"].clone()}
    torch.save(tied, tmp_path / "tied.pt")
    assert load_checkpoint(tmp_path / "tied.pt").config.tied
    torch.save({**tied, "lm_head.weight": torch.randn(64, 16)}, tmp_path / "untied.pt")
    untied = load_checkpoint(tmp_path / "untied.pt")
    assert not untied.config.tied
    ids = torch.randint(0, 64, (1, 5))
    with torch.inference_mode():
        model = build(untied.config, untied.tensors)
        hidden = model.norm(model.layers[-1](_trunk(model, ids)))
        torch.testing.assert_close(model(ids), hidden @ untied.tensors["lm_head.weight"].T)


def _trunk(model: Any, ids: Tensor) -> Tensor:
    x: Tensor = model.embed(ids)
    for layer in model.layers[:-1]:
        x = layer(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_kept_unless_they_are_wider_and_computed_in_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(MAMBA).items()}
    torch.save(tensors, tmp_path / "m.pt")
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "wide.pt")
    found, wide = load_checkpoint(tmp_path / "m.pt"), load_checkpoint(tmp_path / "wide.pt")
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32 if dtype is torch.float64 else dtype}
    assert found.digest == wide.digest
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(build(found.config, found.tensors)(ids), build(wide.config, wide.tensors)(ids))


def test_the_files_own_types_and_bytes_are_kept_and_a_tied_head_counts_once(tmp_path: Path) -> None:
    tensors = in_layout(random_tensors(HUGGING_FACE), "huggingface")
    mixed = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
    head = {"lm_head.weight": mixed["backbone.embeddings.weight"].clone(), "backbone.position_ids": torch.arange(9)}
    torch.save({**mixed, **head}, tmp_path / "m.pt")
    found = load_checkpoint(tmp_path / "m.pt")
    vectors = sum(tensor.numel() for tensor in tensors.values() if tensor.dim() == 1)
    matrices = sum(tensor.numel() for tensor in tensors.values() if tensor.dim() > 1)
    assert found.file_types == {"bfloat16": matrices, "float32": vectors}
    assert found.file_bytes == 2 * matrices + 4 * vectors


def test_expert_counts_are_accepted_and_left_out(tmp_path: Path) -> None:
    tensors = random_tensors(ITERA) | {"layers.1.moe.layer.router.expert_counts": torch.zeros(3, dtype=torch.long)}
    torch.save(tensors, tmp_path / "m.pt")
    assert not any("expert_counts" in name for name in load_checkpoint(tmp_path / "m.pt").tensors)


def test_wrapper_prefixes_are_removed(tmp_path: Path) -> None:
    torch.save({f"module._orig_mod.{k}": v for k, v in random_tensors(MAMBA).items()}, tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt").config == MAMBA


def test_shapes_win_over_the_stored_config(tmp_path: Path) -> None:
    torch.save({"model_state_dict": random_tensors(ITERA), "config": {"d_model": 99, "top_k": 1}}, tmp_path / "m.pt")
    found = load_checkpoint(tmp_path / "m.pt")
    assert isinstance(found.config, IteraConfig)
    assert (found.config.d_model, found.config.top_k) == (16, 1)
    assert "d_model = 99" in found.notes[0]


def hugging_face_folder(folder: Path, config: dict[str, Any], without: str = "nothing") -> Path:
    tensors = in_layout(random_tensors(HUGGING_FACE), "huggingface")
    save_file({name: t for name, t in tensors.items() if without not in name}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "without", "message"),
    [
        ({"model_type": "jamba"}, "nothing", "model_type = 'jamba'"),
        ({"model_type": "mamba", "hidden_act": "relu"}, "nothing", "hidden_act = 'relu'"),
        ({"model_type": "mamba", "tie_word_embeddings": False}, "nothing", r"missing: lm_head\.weight"),
        ({"model_type": "mamba"}, "conv1d.bias", r"missing: layers\.0\.ssm\.conv1d\.bias"),
        ({"model_type": "mamba", "use_bias": True}, "nothing", r"missing: layers\.0\.ssm\.in_proj\.bias"),
    ],
)
def test_what_a_hugging_face_config_declares_must_be_there(
    tmp_path: Path, config: dict[str, Any], without: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(hugging_face_folder(tmp_path, config, without))


def test_a_hugging_face_config_gives_what_shapes_cannot_show(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path, {"model_type": "mamba", "layer_norm_epsilon": 0.5})
    found = load_checkpoint(folder)
    assert found.config.final_norm.eps == 0.5
    (folder / "config.json").write_text("{}")
    assert load_checkpoint(folder).digest != found.digest


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    tensors = in_layout(random_tensors(HUGGING_FACE), "huggingface")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_checkpoint(tmp_path).config == HUGGING_FACE
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not there"):
        load_checkpoint(tmp_path)


def _changed(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {**random_tensors(ITERA), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BAD: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"layers.0.ssm.ssm.B": None}, r"missing: layers\.0\.ssm\.ssm\.B \[4, 32\]"),
    "extra": ({"layers.0.ssm.extra.weight": torch.zeros(2)}, r"unknown: layers\.0\.ssm\.extra\.weight \[2\]"),
    "empty": (
        {"layers.1.moe.layer.router.gate.weight": torch.zeros(0, 16)},
        r"empty: layers\.1\.moe\.layer\.router\.gate\.weight \[0, 16\]",
    ),
    "misshapen": (
        {"layers.0.ssm.out_proj.weight": torch.zeros(16, 31)},
        r"misshapen: .*\[16, 31\], expected \[16, 32\]",
    ),
    "packed": ({"layers.0.ssm.out_proj.weight": torch.zeros(16, 32, dtype=torch.int8)}, r"already quantised.*out_proj"),
    "NaN": ({"layers.0.ssm.ssm.D": torch.full((32,), torch.nan)}, r"NaN or infinite values in: layers\.0\.ssm\.ssm\.D"),
    "layer gap": ({n: None for n in random_tensors(ITERA) if n.startswith("layers.1.")}, r"1 layer is missing.*: 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    torch.save(_changed(**changes), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert "m.pt" in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    torch.save(
        _changed(**{"layers.0.ssm.ssm.B": None, "norm.weight": torch.zeros(3), "odd": torch.zeros(1)}),
        tmp_path / "m.pt",
    )
    with pytest.raises(CheckpointError, match="3 tensors do not fit"):
        load_checkpoint(tmp_path / "m.pt")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    torch.save({"model_state_dict": random_tensors(ITERA), "x": _Malicious(marker)}, tmp_path / "m.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Malicious(marker)))
    for name in ("m.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="refused|not a"):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_and_renamed_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save(random_tensors(MAMBA), whole)
    else:
        save_file(random_tensors(MAMBA), whole)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[:-200])
    renamed = tmp_path / ("renamed.safetensors" if suffix == ".pt" else "renamed.pt")
    renamed.write_bytes(whole.read_bytes())
    text = tmp_path / f"text{suffix}"
    text.write_text("just a text\n" * 50)
    empty = tmp_path / f"empty{suffix}"
    empty.write_bytes(b"")
    for path in (cut, renamed, text, empty):
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)


def test_foreign_files_and_folders_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="no known family"):
        load_checkpoint(tmp_path / "m.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="found list"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="expected a .safetensors"):
        load_checkpoint(Path(__file__))
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        load_checkpoint(tmp_path / "folder")


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(MAMBA)
    torch.save(tensors | {"norm_f.weight": tensors["norm.weight"]}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="two names of one tensor"):
        load_checkpoint(tmp_path / "m.pt")


def test_the_digest_depends_on_every_value(tmp_path: Path) -> None:
    tensors = random_tensors(MAMBA)
    torch.save(tensors, tmp_path / "a.pt")
    save_file(in_layout(tensors, "positions"), tmp_path / "b.safetensors")
    tensors["layers.1.ssm.D"][3] += 1e-3
    torch.save(tensors, tmp_path / "c.pt")
    a, b, c = (load_checkpoint(tmp_path / name).digest for name in ("a.pt", "b.safetensors", "c.pt"))
    assert a == b != c
