from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.families.experts import MOST_EACH
from tests.ssm_mp.families.folders import BY_NAME, Tensors, error_of, folder_of, require_equal, require_refused

DENSE, EXPERTS, LATENT = "nemotron_h/dense", "nemotron_h/experts", "nemotron_h/experts-latent"


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.replace("backbone.", prefix, 1): tensor for name, tensor in tensors.items()}


def test_components_are_named_as_in_its_files(tmp_path: Path) -> None:
    names = load_checkpoint(folder_of(LATENT, tmp_path)).tensors.keys()
    assert {
        "layers.0.norm.weight", "layers.0.mixer.dt_bias", "layers.1.mixer.q_proj.weight", "layers.2.mixer.gate.weight",
        "layers.2.mixer.gate.e_score_correction_bias", "layers.2.mixer.experts.5.up_proj.weight",
        "layers.2.mixer.fc1_latent_proj.weight", "layers.2.mixer.shared_experts.down_proj.weight",
    } <= names  # fmt: skip


def test_many_experts_are_one_component_a_projection(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder_of("nemotron_h/many-experts", tmp_path))
    block = checkpoint.config.branches[1][0].parts[0].block
    assert isinstance(block, Experts)
    assert block.experts > MOST_EACH
    assert checkpoint.tensors["layers.1.mixer.experts.up_proj.weight"].shape == (20 * 24, 48)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_other_prefixes_are_read_as_the_same_model(prefix: str, tmp_path: Path) -> None:
    plain = load_checkpoint(folder_of(EXPERTS, tmp_path))
    folder = folder_of(EXPERTS, tmp_path / "other", turned=lambda tensors: under(prefix, tensors))
    require_equal(load_checkpoint(folder), plain)


def test_names_in_memory_are_read_as_the_same_model(tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path)
    plain = load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.save(BY_NAME[EXPERTS].make().state_dict(), folder / "pytorch_model.bin")
    require_equal(load_checkpoint(folder), plain)


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_layers_that_predict_further_tokens_are_left_out(prefix: str, tmp_path: Path) -> None:
    def longer(tensors: Tensors) -> Tensors:
        more = {f"mtp.layers.0.mixer.{leaf}.weight": torch.ones(3, 3) for leaf in ("q_proj", "experts.0.up_proj")}
        return {**under(prefix, tensors), **more, "mtp.layers.0.eh_proj.weight": torch.ones(3, 3)}

    plain = load_checkpoint(folder_of(EXPERTS, tmp_path))
    found = load_checkpoint(folder_of(EXPERTS, tmp_path / "more", turned=longer))
    require_equal(found, plain)
    assert any("mtp" in note and "not read" in note for note in found.notes)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_block_type": None, "hybrid_override_pattern": "M*-E"},
        {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
        {"layers_block_type": None},
    ],
    ids=["pattern", "old-words", "none"],
)
def test_layers_are_said_in_any_way(config: dict[str, object], tmp_path: Path) -> None:
    plain = load_checkpoint(folder_of(EXPERTS, tmp_path))
    require_equal(load_checkpoint(folder_of(EXPERTS, tmp_path / "other", config)), plain)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("M*-X", ("found 'X'",)), ("M*-", ("4 layers", "3 layers")), ("M*-EM", ("4 layers", "5 layers")),
        ("M-*E", ("hybrid_override_pattern[1]", "'attention'", "'-'")), ("", ("a list of",)),
    ],
)  # fmt: skip
def test_another_pattern_is_refused(pattern: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path, {"layers_block_type": None, "hybrid_override_pattern": pattern})
    require_refused(folder, "hybrid_override_pattern", *parts)


def test_an_unknown_layer_type_is_refused(tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path, {"layers_block_type": ["mamba", "attention", "mlp", "sparse"]})
    require_refused(folder, "layers_block_type", "found 'sparse'")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 32, "48"), ("vocab_size", 100, "101"), ("mamba_num_heads", 5, "6"), ("mamba_head_dim", 9, "12"),
        ("ssm_state_size", 16, "48"), ("n_groups", 3, "48"), ("n_groups", 5, "a divisor of 48"),
        ("conv_kernel", 3, "4"), ("num_attention_heads", 4, "72 inputs"), ("num_key_value_heads", 3, "24 rows"),
        ("head_dim", 16, "12"),
        ("n_routed_experts", 5, "6"), ("moe_intermediate_size", 25, "24"), ("moe_latent_size", 48, "40"),
        ("moe_shared_expert_intermediate_size", 48, "40"), ("num_experts_per_tok", 7, "at most the 6"),
        ("n_group", 4, "a divisor of the 6"), ("topk_group", 2, "at most the 1"), ("use_conv_bias", False, "true"),
        ("mlp_hidden_act", "silu", "'relu2'"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_file_is_refused(key: str, value: object, expected: str, tmp_path: Path) -> None:
    require_refused(folder_of(LATENT, tmp_path, {key: value}), key, expected)


def test_the_width_of_a_feed_forward_is_held_against_the_file(tmp_path: Path) -> None:
    require_refused(folder_of(DENSE, tmp_path, {"intermediate_size": 70}), "intermediate_size", "expected 72")


@pytest.mark.parametrize("key", ["n_groups", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"])
def test_what_shapes_cannot_tell_must_be_said(key: str, tmp_path: Path) -> None:
    require_refused(folder_of(EXPERTS, tmp_path, {key: None}), key, "found nothing")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = folder_of(EXPERTS, tmp_path)
    (folder / "config.json").unlink()
    require_refused(folder, "n_groups", "which is not there")


def test_experts_of_unequal_number_are_refused(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if "experts.5.up_proj" not in name}

    said = error_of(folder_of(EXPERTS, tmp_path, turned=fewer))
    assert "as many experts for every projection" in said
    assert "down_proj.weight of 6" in said
    assert "up_proj.weight of 5" in said


@pytest.mark.parametrize(
    ("config", "floor"),
    [
        ({}, 0.001), ({"time_step_min": 0.1}, 0.1), ({"time_step_limit": [0.2, 0.5]}, 0.001),
        ({"mamba_dt_min": 0.05}, 0.05),
    ],
)  # fmt: skip
def test_steps_have_a_floor_and_no_ceiling(config: dict[str, object], floor: float, tmp_path: Path) -> None:
    block = load_checkpoint(folder_of(DENSE, tmp_path, config)).config.branches[0][0].parts[0].block
    assert isinstance(block, Mamba2)
    assert block.dt_limits == (floor, None)


def test_keys_of_before_are_read(tmp_path: Path) -> None:
    plain = load_checkpoint(folder_of(DENSE, tmp_path))
    config = {
        "n_groups": None, "mamba_n_groups": 2, "conv_kernel": None, "mamba_d_conv": 4, "attention_head_dim": 12,
        "num_query_groups": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    found = load_checkpoint(folder_of(DENSE, tmp_path / "old", config))
    require_equal(found, plain)
    assert found.notes == ()
