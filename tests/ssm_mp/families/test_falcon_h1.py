from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.checkpoints import load_checkpoint
from tests.ssm_mp.families.folders import Tensors, error_of, folder_of, require_equal, require_refused

PLAIN, WIDTH, EXPANDED = "falcon_h1/norm-then-gate", "falcon_h1/head-width", "falcon_h1/expanded"


def test_every_layer_has_attention_and_mamba_under_one_norm(tmp_path: Path) -> None:
    for side_by_side, forward in load_checkpoint(folder_of(PLAIN, tmp_path)).config.branches:
        assert [part.name for part in side_by_side.parts] == ["mamba", "self_attn"]
        assert [(part.before, part.after) for part in side_by_side.parts] == [(1.3, 0.9), (1.2, 0.8)]
        assert [part.name for part in forward.parts] == ["feed_forward"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 32, "48"), ("vocab_size", 100, "101"), ("num_hidden_layers", 1, "2"),
        ("intermediate_size", 70, "72"), ("mamba_d_ssm", 96, "72"), ("mamba_n_heads", 4, "6"),
        ("mamba_d_head", 16, "12"), ("mamba_d_state", 12, "48"), ("mamba_n_groups", 3, "48"),
        ("mamba_n_groups", 5, "a divisor of 48"), ("mamba_d_conv", 3, "4"), ("num_attention_heads", 4, "84 inputs"),
        ("num_key_value_heads", 3, "28 rows"), ("head_dim", 16, "14"), ("mamba_conv_bias", False, "true"),
        ("mamba_rms_norm", False, "true"), ("ssm_multipliers", [1.0, 2.0], "5 numbers"),
        ("mlp_multipliers", 1.0, "2 numbers"), ("key_multiplier", "large", "a number"),
        ("rope_parameters", 3, "a dictionary"), ("rope_parameters", {"rope_type": "strange"}, "'strange'"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_file_is_refused(key: str, value: object, expected: str, tmp_path: Path) -> None:
    require_refused(folder_of(WIDTH, tmp_path, {key: value}), key, expected)


@pytest.mark.parametrize("key", ["mamba_n_groups", "num_attention_heads", "num_key_value_heads"])
def test_what_shapes_cannot_tell_must_be_said(key: str, tmp_path: Path) -> None:
    require_refused(folder_of(WIDTH, tmp_path, {key: None}), key, "found nothing")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = folder_of(PLAIN, tmp_path)
    (folder / "config.json").unlink()
    require_refused(folder, "num_attention_heads", "which is not there")


@pytest.mark.parametrize(
    ("config", "gate"),
    [
        ({}, "norm_first"), ({"mamba_norm_before_gate": False}, "gate_first"),
        ({"mamba_norm_before_gate": None}, "norm_first"),
    ],
)  # fmt: skip
def test_the_config_says_whether_the_gate_comes_first(config: dict[str, object], gate: str, tmp_path: Path) -> None:
    block = load_checkpoint(folder_of(PLAIN, tmp_path, config)).config.branches[0][0].parts[0].block
    assert isinstance(block, Mamba2)
    assert block.gate == gate


def test_missing_norms_are_named(tmp_path: Path) -> None:
    folder = folder_of("falcon_h1/no-norm", tmp_path, {"mamba_rms_norm": True})
    assert "missing: layers.0.mamba.norm.weight [72]" in error_of(folder)


def test_the_hub_of_before_is_the_same_model(tmp_path: Path) -> None:
    """`rope_theta` beside, a number too large for a whole one of 32 bits, and keys that its own code had."""
    old = {
        "rope_parameters": None, "rope_theta": 100000000000.0, "rope_scaling": None, "attn_layer_indices": None,
        "mamba_use_mlp": True, "mlp_expansion_factor": 8, "mamba_d_head": "auto",
    }  # fmt: skip
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e11}}
    found = load_checkpoint(folder_of(WIDTH, tmp_path / "old", old))
    require_equal(found, load_checkpoint(folder_of(WIDTH, tmp_path / "new", new)))
    assert found.notes == ()
    attention = found.config.branches[0][0].parts[1].block
    assert isinstance(attention, Attention)
    assert attention.rotary is not None
    assert (attention.rotary.theta, attention.rotary.dims) == (1e11, 14)


def test_an_inner_width_that_is_not_said_is_a_multiple_of_the_width(tmp_path: Path) -> None:
    assert load_checkpoint(folder_of(EXPANDED, tmp_path)).config.n_layers == 2
    require_refused(folder_of(EXPANDED, tmp_path / "3", {"mamba_expand": 3}), "mamba_expand", "expected 2", "found 3")


def test_weights_that_are_multiplied_already_are_refused(tmp_path: Path) -> None:
    def mlx(tensors: Tensors) -> Tensors:
        return {name: t.transpose(1, 2) if name.endswith("conv1d.weight") else t for name, t in tensors.items()}

    said = error_of(folder_of(PLAIN, tmp_path, turned=mlx))
    assert "expected [W, 1, K], found [W, 4, 1]" in said
    assert "multipliers" in said
