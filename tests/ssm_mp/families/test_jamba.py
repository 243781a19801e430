from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.checkpoints import load_checkpoint
from tests.ssm_mp.families.folders import Tensors, error_of, folder_of, require_equal, require_refused

EXPERTS, DENSE = "jamba/experts", "jamba/dense"


def without_norms(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "mamba." not in name or "_layernorm" not in name}


def test_components_are_named_as_in_its_files(tmp_path: Path) -> None:
    names = load_checkpoint(folder_of(EXPERTS, tmp_path)).tensors.keys()
    assert {
        "layers.0.input_layernorm.weight", "layers.0.mamba.dt_layernorm.weight", "layers.0.mamba.b_layernorm.weight",
        "layers.0.feed_forward.gate_proj.weight", "layers.1.feed_forward.router.weight",
        "layers.1.feed_forward.experts.3.up_proj.weight", "layers.2.self_attn.o_proj.weight",
    } <= names  # fmt: skip


@pytest.mark.parametrize("name", [EXPERTS, DENSE])
def test_what_a_layer_has_is_read_from_its_tensors(name: str, tmp_path: Path) -> None:
    plain = load_checkpoint(folder_of(name, tmp_path))
    keys = ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset")
    require_equal(load_checkpoint(folder_of(name, tmp_path / "silent", dict.fromkeys(keys))), plain)


@pytest.mark.parametrize("name", [EXPERTS, DENSE])
def test_a_model_without_a_type_is_told_by_its_tensors(name: str, tmp_path: Path) -> None:
    assert load_checkpoint(folder_of(name, tmp_path, {"model_type": None})).family == "jamba"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 32, "48"), ("vocab_size", 100, "101"), ("num_hidden_layers", 3, "4"),
        ("intermediate_size", 70, "72"), ("mamba_d_state", 16, "5"), ("mamba_dt_rank", 3, "7"),
        ("mamba_dt_rank", "auto", "7"), ("mamba_d_conv", 3, "4"), ("mamba_expand", 3, "2"), ("num_experts", 3, "4"),
        ("num_experts_per_tok", 5, "at most the 4"), ("attn_layer_period", 2, "layers [2]"),
        ("attn_layer_offset", 1, "layers [2]"), ("expert_layer_period", 3, "layers [1, 3]"),
        ("expert_layer_offset", 0, "layers [1, 3]"), ("num_attention_heads", 5, "48 inputs"),
        ("num_key_value_heads", 3, "16 rows"), ("mamba_conv_bias", False, "true"),
        ("mamba_inner_layernorms", False, "true"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_file_is_refused(key: str, value: object, expected: str, tmp_path: Path) -> None:
    require_refused(folder_of(EXPERTS, tmp_path, {key: value}), key, expected)


def test_experts_that_are_said_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    require_refused(folder_of(DENSE, tmp_path, {"num_experts": 4}), "expert_layer_period", "layers []", "layers [1, 3]")


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "num_experts_per_tok"])
def test_what_shapes_cannot_tell_must_be_said(key: str, tmp_path: Path) -> None:
    require_refused(folder_of(EXPERTS, tmp_path, {key: None}), key, "found nothing")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path)
    (folder / "config.json").unlink()
    require_refused(folder, "num_attention_heads", "which is not there")


def test_a_model_may_have_no_inner_norms(tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path, {"mamba_inner_layernorms": False}, without_norms)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.notes == ()
    block = checkpoint.config.branches[0][0].parts[0].block
    assert isinstance(block, Mamba1)
    assert not block.has_inner_norms


def test_missing_inner_norms_are_named(tmp_path: Path) -> None:
    said = error_of(folder_of(EXPERTS, tmp_path, turned=without_norms))
    assert "missing: layers.0.mamba.dt_layernorm.weight [7]" in said


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("experts.3.up_proj", ("down_proj.weight of 4", "up_proj.weight of 3")),
        ("experts.1.up_proj", ("expert 1 has no up_proj.weight",)),
    ],
)
def test_experts_of_unequal_number_are_refused(gone: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if f"layers.1.feed_forward.{gone}" not in name}

    said = error_of(folder_of(EXPERTS, tmp_path, turned=fewer))
    assert "\n" not in said
    for part in parts:
        assert part in said


def test_layers_with_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        left = {name: t for name, t in tensors.items() if "layers.3.feed_forward.experts.3." not in name}
        return {name: t[:3] if name.endswith("layers.3.feed_forward.router.weight") else t for name, t in left.items()}

    assert "found 4 of layers.1.feed_forward.experts, 3 of layers.3.feed_forward.experts" in error_of(
        folder_of(EXPERTS, tmp_path, turned=fewer)
    )
