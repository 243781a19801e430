from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.checkpoints import load_checkpoint
from tests.ssm_mp.families.folders import error_of, folder_of, require_equal, require_refused

PLAIN = "falcon_mamba/plain"


def test_components_are_named_as_in_its_files(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder_of(PLAIN, tmp_path))
    assert checkpoint.family == "falcon_mamba"
    assert {"layers.0.norm.weight", "layers.2.mixer.x_proj.weight", "lm_head.weight"} <= checkpoint.tensors.keys()


def test_only_the_model_type_tells_it_from_mamba(tmp_path: Path) -> None:
    folder = folder_of(PLAIN, tmp_path, {"model_type": "mamba"})
    assert load_checkpoint(folder).family == "mamba"


def test_a_config_of_falcon_mamba_without_its_type_is_refused(tmp_path: Path) -> None:
    require_refused(folder_of(PLAIN, tmp_path, {"model_type": None}), "model_type", "'falcon_mamba'")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 32, "48"), ("vocab_size", 100, "101"), ("num_hidden_layers", 2, "3"), ("state_size", 16, "5"),
        ("time_step_rank", 3, "7"), ("conv_kernel", 3, "4"), ("intermediate_size", 64, "96"),
        ("use_conv_bias", False, "true"), ("hidden_act", "gelu", "'silu'"), ("mixer_rms_eps", -1.0, "from 0 to 1"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_file_is_refused(key: str, value: object, expected: str, tmp_path: Path) -> None:
    require_refused(folder_of(PLAIN, tmp_path, {key: value}), key, expected, f"found {value!r}")


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    assert "missing: layers.0.mixer.in_proj.bias" in error_of(folder_of(PLAIN, tmp_path, {"use_bias": True}))


def test_an_automatic_rank_is_a_sixteenth_of_the_width(tmp_path: Path) -> None:
    require_refused(folder_of(PLAIN, tmp_path, {"time_step_rank": "auto"}), "time_step_rank", "expected 7", "found 3")


def test_the_inner_width_wins_over_what_is_multiplied(tmp_path: Path) -> None:
    """The hub's Falcon-Mamba 7B says 16 where it is 2."""
    plain = load_checkpoint(folder_of(PLAIN, tmp_path))
    require_equal(load_checkpoint(folder_of(PLAIN, tmp_path / "hub", {"expand": 16})), plain)
    alone = folder_of(PLAIN, tmp_path / "alone", {"expand": 16, "intermediate_size": None})
    require_refused(alone, "expand", "expected 2", "found 16")


def test_inner_norms_have_the_epsilon_of_the_config(tmp_path: Path) -> None:
    block = load_checkpoint(folder_of(PLAIN, tmp_path, {"mixer_rms_eps": 0.25})).config.branches[0][0].parts[0].block
    assert isinstance(block, Mamba1)
    assert block.weightless_eps == 0.25
