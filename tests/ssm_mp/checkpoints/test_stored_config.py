from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.families.itera import IteraConfig
from ssm_mp.families.registry import FAMILIES
from ssm_mp.files.config_keys import IRRELEVANT, USED
from ssm_mp.files.record import Record
from ssm_mp.files.stored_config import StoredConfig, config_within
from tests.ssm_mp.files.written import hugging_face
from tests.tiny import HUGGING_FACE, ITERA, random_tensors


def with_stored(config: Config, stored: StoredConfig) -> tuple[Config, tuple[str, ...]]:
    """The configuration that a model's shapes and a stored config show."""
    shapes = {name: tuple(tensor.shape) for name, tensor in random_tensors(config).items()}
    return FAMILIES[config.family].config(shapes, stored)


def with_config(folder: Path, text: str | dict[str, Any]) -> Checkpoint:
    save_file(hugging_face(), folder / "model.safetensors")
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return load_checkpoint(folder)


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "norm_eps", "rms_norm_eps", "norm_epsilon", "layer_norm_eps"])
@pytest.mark.parametrize("value", [1, 0, 1e-6, 1.0])
def test_an_epsilon_is_used_whatever_its_key_and_type(tmp_path: Path, key: str, value: float) -> None:
    assert with_config(tmp_path, {key: value}).config.final_norm.eps == value


WRONG = [
    ("layer_norm_epsilon", "-1e-5"), ("layer_norm_epsilon", "-1"), ("layer_norm_epsilon", "1e30"),
    ("layer_norm_epsilon", "true"), ("layer_norm_epsilon", '"1e-5"'), ("layer_norm_epsilon", "NaN"),
    ("layer_norm_epsilon", "Infinity"), ("layer_norm_epsilon", '{"__float__": "Infinity"}'), ("norm_eps", "[1e-5]"),
    ("hidden_size", '"16"'), ("hidden_size", "true"), ("hidden_size", "16.5"), ("hidden_size", "-16"),
    ("hidden_size", '"auto"'), ("vocab_size", "0"), ("num_hidden_layers", "[2]"), ("vocab_size", "1" + "0" * 300),
    ("time_step_rank", '"other"'), ("tie_word_embeddings", "1"), ("use_bias", '"false"'), ("use_conv_bias", "0"),
    ("expand", '"2"'), ("rms_norm", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_that_a_key_cannot_have_is_refused_with_file_key_expected_and_found(
    tmp_path: Path, key: str, value: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}: expected .*, found .") as caught:
        with_config(tmp_path, f'{{"{key}": {value}}}')
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "3", "{", "", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        with_config(tmp_path, content)


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert with_config(tmp_path, '\ufeff{"layer_norm_epsilon": 0.25}').config.final_norm.eps == 0.25


REFUSED = [
    ({"model_type": "mamba2"}, "model_type = 'mamba2'"),
    ({"model_type": 3}, "model_type = 3"),
    ({"activation": "gelu"}, "activation = 'gelu'"),
    ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer = 'Mamba2'"),
    ({"attn_layer_idx": [3]}, "attention layers"),
    ({"rms_norm": False}, "a LayerNorm, which the norms in the file are not"),
    ({"tie_embeddings": False}, r"missing: lm_head\.weight"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_of_another_forward_pass_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        with_config(tmp_path, config)


NOTED = [
    ({"hidden_size": 48}, "hidden_size = 48, the shapes say 16; the shapes win"),
    ({"hidden_size": 48.0}, "hidden_size = 48, the shapes say 16"),
    ({"ssm_cfg": {"d_state": 16}}, "d_state = 16, the shapes say 4"),
    ({"time_step_rank": "auto"}, "time_step_rank = 1, the shapes say 2"),
    ({"expand": 3}, "expand = 3 of 16, the shapes say 32"),
    ({"vocab_size": 60}, "vocab_size = 60, the shapes say 64"),
    ({"max_position_embeddings": 2048}, "not used: max_position_embeddings"),
    ({"gate_lora_dim": 8, "sparse": True}, "not used: gate_lora_dim, sparse"),
    ({"use_conv_bias": False}, "says that there is no conv_bias, but the file holds it; it is used"),
    ({"norm_eps": 1e-5, "rms_norm_eps": 1e-6}, "norm_eps = 1e-05, rms_norm_eps = 1e-06; the first is used"),
]


@pytest.mark.parametrize(("config", "note"), NOTED)
def test_what_a_config_says_beside_the_shapes_is_noted(tmp_path: Path, config: dict[str, Any], note: str) -> None:
    (found,) = with_config(tmp_path, config).notes
    assert note in found


def test_the_config_that_transformers_writes_needs_no_note(tmp_path: Path) -> None:
    from transformers import MambaConfig

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 2,
        "time_step_rank": 2,
    }
    assert with_config(tmp_path, MambaConfig(**sizes).to_json_string(use_diff=False)).notes == ()


def test_the_original_repositorys_config_needs_no_note(tmp_path: Path) -> None:
    config = {
        "d_model": 16, "n_layer": 2, "vocab_size": 57, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "attn_layer_idx": [], "tie_embeddings": True,
    }  # fmt: skip
    assert with_config(tmp_path, config).notes == ()


def test_a_head_that_a_config_ties_but_the_file_does_not_is_used_and_noted(tmp_path: Path) -> None:
    save_file({**hugging_face(), "lm_head.weight": torch.randn(64, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    found = load_checkpoint(tmp_path)
    assert not found.config.tied
    assert "ties the head" in found.notes[0]


def test_other_families_sizes_are_compared_layer_by_layer(tmp_path: Path) -> None:
    def notes(config: dict[str, Any]) -> tuple[str, ...]:
        torch.save({"model": random_tensors(ITERA), "config": config}, tmp_path / "m.pt")
        return load_checkpoint(tmp_path / "m.pt").notes

    assert notes({"d_state": 5, "n_layers": 3, "top_k": 1}) == ()
    assert notes({"d_state": 6})[0].endswith("d_state = 6, the shapes say 4 and 5; the shapes win")
    assert notes({"model_type": "itera", "dt_rank": 3}) == ("config in m.pt: not used: model_type, dt_rank",)
    for top_k in (True, "2", 0, -1, 1.5):
        with pytest.raises(CheckpointError, match="config in m.pt: top_k: expected a whole number above 0"):
            notes({"top_k": top_k})


KEPT: dict[str, object] = {
    "dictionary": {"top_k": 1, "norm_eps": 0.25},
    "argparse": Record("argparse.Namespace", {"top_k": 1, "norm_eps": 0.25}),
    "numpy": Record("models.config.IteraLiteConfig", {"top_k": np.int64(1), "norm_eps": np.float32(0.25)}),
    "sections": {"model": {"top_k": 1, "norm_eps": 0.25}, "training": {"lr": 1}},
    "OmegaConf": Record(
        "omegaconf.dictconfig.DictConfig",
        {
            "_metadata": None, "_parent": None,
            "_content": {
                "top_k": Record("omegaconf.nodes.AnyNode", {"_val": 1}),
                "norm_eps": Record("omegaconf.nodes.AnyNode", {"_val": 0.25}),
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("held", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("key", ["config", "hyper_parameters", "args", "cfg", "model_config"])
def test_a_config_is_found_beside_the_weights_whatever_holds_it(held: object, key: str) -> None:
    config, notes = with_stored(ITERA, config_within({"model": {}, key: held}, "m.pt"))
    assert isinstance(config, IteraConfig)
    assert (config.top_k, config.final_norm.eps, notes) == (1, 0.25, ())


numbers = st.integers() | st.floats() | st.integers(min_value=10**300, max_value=10**310)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
configs = st.dictionaries(st.sampled_from(sorted(USED | IRRELEVANT)) | st.text(max_size=8), values, max_size=6)


@settings(max_examples=20, deadline=None)
@given(configs)
def test_any_config_gives_a_checkpoint_or_one_error(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = with_config(Path(folder), config)
        except CheckpointError:
            return
    assert 0 <= found.config.final_norm.eps <= 1


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([HUGGING_FACE, ITERA]), configs)
def test_no_value_of_a_config_is_passed_over(shapes: Config, config: dict[str, Any]) -> None:
    stored = config_within({"config": config}, "m.pt")
    try:
        notes = with_stored(shapes, stored)[1]
    except CheckpointError:
        return
    unknown = stored.values.keys() - USED - IRRELEVANT
    assert not unknown or any("not used: " in note for note in notes)
    for key, held in (("d_model", shapes.d_model), ("n_layers", shapes.n_layers)):
        assert stored.values.get(key) in (None, held) or any(f"{key} = " in note for note in notes)
