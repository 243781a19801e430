from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_mp.blocks.experts import Experts
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from ssm_mp.families.hybrid import HybridConfig
from tests.families.tiny_models import written
from tests.ssm_mp.families.changed_folders import BY_NAME, Tensors, changed, held, same

PLAIN, EXPERTS = "lfm2/plain", "lfm2_moe/plain"


@pytest.mark.parametrize("case", [case for case in BY_NAME if case.startswith("lfm2")])
def test_every_key_that_transformers_writes_is_known(tmp_path: Path, case: str) -> None:
    assert load_checkpoint(changed(case, tmp_path)).notes == ()


def test_an_unknown_key_is_noted(tmp_path: Path) -> None:
    notes = load_checkpoint(changed(PLAIN, tmp_path, {"loop_layers": 3})).notes
    assert notes == ("config.json: not used: loop_layers",)


@pytest.mark.parametrize(
    ("case", "key", "value", "expected"),
    [
        (PLAIN, "hidden_size", 64, "48, as the tensors' shapes show"),
        (PLAIN, "vocab_size", 100, "101, as"),
        (PLAIN, "num_hidden_layers", 4, "3, as"),
        (PLAIN, "intermediate_size", 200, "what makes feed-forwards of 72.*it makes 144"),
        (PLAIN, "block_ff_dim", 200, "what makes feed-forwards of 72"),
        ("lfm2/width-as-given", "intermediate_size", 64, "what makes feed-forwards of 100"),
        (PLAIN, "conv_L_cache", 4, "3, as"),
        (PLAIN, "num_attention_heads", 8, "heads of 8 that make the 48 inputs of o_proj"),
        (PLAIN, "num_attention_heads", None, "a whole number above 0, found nothing"),
        (PLAIN, "num_key_value_heads", 3, "heads of 8 that make .* the 16 rows of k_proj"),
        (PLAIN, "num_key_value_heads", 4, "heads of 8 that make"),
        (PLAIN, "head_dim", 16, "8, as"),
        (PLAIN, "layer_types", ["conv", "mamba", "conv"], "'conv'.*found 'mamba'"),
        (PLAIN, "layer_types", ["conv", "full_attention"], "3 layers.*2 layers"),
        (PLAIN, "layer_types", ["full_attention", "conv", "conv"], "'conv', as the tensors of layer 0 show"),
        (PLAIN, "rope_parameters", {"rope_type": "spiral"}, "'default', 'linear', 'llama3' or 'yarn'"),
        (PLAIN, "sliding_window", 64, "sliding window is not computed"),
        (PLAIN, "norm_eps", "small", "a number from 0 to 1"),
        (EXPERTS, "intermediate_size", 64, "72, as"),
        (EXPERTS, "moe_intermediate_size", 32, "24, as"),
        (EXPERTS, "num_experts", 6, "5, as"),
        (EXPERTS, "num_experts_per_tok", 6, "at most the 5 experts"),
        (EXPERTS, "num_experts_per_tok", None, "found nothing"),
        (EXPERTS, "num_dense_layers", 2, "1, as the tensors show"),
        (EXPERTS, "use_expert_bias", False, "true, as there is feed_forward.expert_bias"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_one_error(
    tmp_path: Path, case: str, key: str, value: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}.*{expected}") as caught:
        load_checkpoint(changed(case, tmp_path, {key: value}))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_asks_for_it(tmp_path: Path) -> None:
    (changed(PLAIN, tmp_path) / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"config\.json, which is not there: num_attention_heads: expected a whole"
    ):
        load_checkpoint(tmp_path)


def test_the_first_releases_words_are_read(tmp_path: Path) -> None:
    old = {
        "layer_types": None, "full_attn_idxs": [1], "rope_parameters": None, "rope_theta": 1e6, "block_ff_dim": 100,
        "intermediate_size": 1, "tie_word_embeddings": None, "tie_embedding": True, "block_dim": 48, "num_heads": 6,
        "block_norm_eps": 1e-5, "block_use_swiglu": True, "conv_dim": 48, "theta": 1e6, "use_pos_enc": True,
    }  # fmt: skip
    found = load_checkpoint(changed(PLAIN, tmp_path, old))
    (tmp_path / "new").mkdir()
    assert found.notes == ()
    assert found.config == load_checkpoint(changed(PLAIN, tmp_path / "new")).config


def test_attention_at_other_layers_than_listed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"full_attn_idxs: expected \[1\], as the tensors show, found \[0"):
        load_checkpoint(changed(PLAIN, tmp_path, {"layer_types": None, "full_attn_idxs": [0, 2]}))


def test_a_head_of_its_own_that_is_declared_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_checkpoint(changed(PLAIN, tmp_path, {"tie_word_embeddings": None, "tie_embedding": False}))


def test_a_model_of_convolutions_alone_needs_no_heads(tmp_path: Path) -> None:
    def without_attention(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
        return {name.replace(".layers.2.", ".layers.1."): tensor.clone() for name, tensor in kept.items()}

    config = {"layer_types": ["conv", "conv"], "num_hidden_layers": 2, "num_attention_heads": None}
    assert load_checkpoint(changed(PLAIN, tmp_path, config, without_attention)).config.n_layers == 2


def test_experts_of_unequal_number_are_refused(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if ".1.feed_forward.experts.4.w3" not in name}

    with pytest.raises(CheckpointError, match=r"experts: expected as many experts .*w1\.weight of 5.*w3\.weight of 4"):
        load_checkpoint(changed(EXPERTS, tmp_path, tensors=fewer))


@pytest.mark.parametrize("case", [PLAIN, EXPERTS])
def test_shards_are_the_same_model(tmp_path: Path, case: str) -> None:
    (tmp_path / "whole").mkdir()
    shards = load_checkpoint(written(BY_NAME[case], tmp_path / "shards", shard_size="20KB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert shards.digest == load_checkpoint(changed(case, tmp_path / "whole")).digest


@pytest.mark.parametrize("case", [PLAIN, EXPERTS])
def test_bfloat16_is_the_same_model_rounded(tmp_path: Path, case: str) -> None:
    (tmp_path / "whole").mkdir()
    half = load_checkpoint(written(BY_NAME[case], tmp_path / "half", dtype=torch.bfloat16))
    whole = load_checkpoint(changed(case, tmp_path / "whole"))
    assert half.config == whole.config
    assert same(half.tensors, {name: tensor.bfloat16().float() for name, tensor in whole.tensors.items()})


def test_other_files_beside_are_no_trouble(tmp_path: Path) -> None:
    changed(PLAIN, tmp_path)
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert load_checkpoint(tmp_path).notes == ()


def test_experts_are_read_as_transformers_has_them_in_memory(tmp_path: Path) -> None:
    changed(EXPERTS, tmp_path)
    expected = load_checkpoint(tmp_path)
    in_memory = BY_NAME[EXPERTS].make().state_dict()
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in in_memory
    (tmp_path / "model.safetensors").unlink()
    torch.save(in_memory, tmp_path / "pytorch_model.bin")
    assert load_checkpoint(tmp_path).digest == expected.digest


def test_experts_in_two_ways_are_refused(tmp_path: Path) -> None:
    def both(tensors: Tensors) -> Tensors:
        return {**tensors, "model.layers.1.feed_forward.experts.down_proj": torch.zeros(5, 48, 24)}

    with pytest.raises(CheckpointError, match="hold the same experts; keep one of them"):
        load_checkpoint(changed(EXPERTS, tmp_path, tensors=both))


def test_experts_of_a_layer_are_components_by_their_number(tmp_path: Path) -> None:
    config = load_checkpoint(changed(EXPERTS, tmp_path)).config
    assert isinstance(config, HybridConfig)
    blocks = [layer[1].parts[0].block for layer in config.layers]
    assert [isinstance(block, Experts) and not block.together for block in blocks] == [False, True, True, True]
    assert held(EXPERTS)[0]["num_dense_layers"] == 1
