"""GGUF files of every family and option, read by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_mp.blocks.experts import Experts
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.conversion.regroup import regrouped
from ssm_mp.runtimes.gguf.architectures import architecture_of, blocks_of, families
from ssm_mp.runtimes.gguf.format import GGUF
from ssm_mp.runtimes.verify import twin_difference
from tests.ssm_mp.runtimes.checking import TWIN, checked, ids_of, item_of, mixed_rules
from tests.ssm_mp.runtimes.gguf.models import NAMES, checkpoint_of
from tests.tiny import in_layout

VOCABULARY = 101
ONE_EACH = tuple({name.partition("/")[0]: name for name in reversed(NAMES)}.values())
"""The first of each family: a map of it is written, which says what its float32 twin alone says too."""


def together(checkpoint: Checkpoint) -> Checkpoint:
    held = any(isinstance(block, Experts) for block in blocks_of(checkpoint.config))
    return regrouped(checkpoint, "together") if held else checkpoint


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_EACH])
def test_llama_cpp_computes_what_the_model_computes(tmp_path: Path, name: str) -> None:
    item = item_of(checkpoint_of(name), {"*": "fp16"})

    assert twin_difference(GGUF, item, tmp_path, ids_of(VOCABULARY, seed=4).numpy()) <= TWIN


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_mixed_map_is_held_exactly_in_the_bytes_foretold_and_confirmed_by_llama_cpp(
    tmp_path: Path, name: str
) -> None:
    checkpoint = together(checkpoint_of(name))
    item = item_of(checkpoint, mixed_rules(GGUF, checkpoint, "int8", "int4", "fp16", "int3"))
    assert {item.precision(one.name) for one in item.components} == {"int8", "int4", "int3", "fp16"}

    done = checked(GGUF, item, tmp_path, ids_of(VOCABULARY, length=12, seed=5))

    assert not done.plan.widened


@pytest.mark.parametrize("name", ["mamba2/groups-2", "granitemoehybrid/experts", "falcon_h1/plain", "lfm2_moe/plain"])
def test_five_and_six_bits_are_held_exactly_and_confirmed_by_llama_cpp(tmp_path: Path, name: str) -> None:
    checkpoint = together(checkpoint_of(name))
    item = item_of(checkpoint, mixed_rules(GGUF, checkpoint, "int5", "int6"))

    checked(GGUF, item, tmp_path, ids_of(VOCABULARY, length=12, seed=5))

    words = {GGUF.encoding(one, item.precision(one.name), item.config).word for one in item.components}  # type: ignore[union-attr]
    assert {"Q5_0", "Q8_0"} < words


def test_every_family_that_has_an_architecture_is_run_here() -> None:
    assert {name.partition("/")[0] for name in NAMES} == set(families())


def test_the_layout_of_the_original_repository_needs_no_config_of_hugging_face(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = checkpoint_of("mamba/untied")
    save_file(in_layout(dict(checkpoint.tensors), "original"), tmp_path / "model.safetensors")
    original = load_checkpoint(tmp_path / "model.safetensors")
    assert original.layout == "original"
    assert not original.source

    item = item_of(original, {"*": "int8"})

    checked(GGUF, item, tmp_path, ids_of(VOCABULARY, length=12))


def test_pieces_of_in_proj_with_one_precision_are_one_tensor(tmp_path: Path) -> None:
    checkpoint = regrouped(checkpoint_of("mamba2/groups-2"), split=("in_proj",))
    item = item_of(checkpoint, {"*": "fp16", "*.in_proj.*": "int8"})

    checked(GGUF, item, tmp_path, ids_of(VOCABULARY, length=12))

    whole, expected = item.config, GGUF.expected(item)["blk.0.ssm_in.weight"]()
    pieces = [item.tensor(f"layers.0.mixer.in_proj.{piece}.weight") for piece in ("z", "x", "B", "C", "dt")]
    assert torch.equal(torch.from_numpy(expected), torch.cat(pieces))
    assert architecture_of(whole) is not None


def test_experts_that_are_a_component_each_are_one_tensor_where_they_have_one_precision(tmp_path: Path) -> None:
    item = item_of(checkpoint_of("granitemoehybrid/experts"), {"*": "fp16", "*.experts.*": "int4"})

    checked(GGUF, item, tmp_path, ids_of(VOCABULARY, length=12))
