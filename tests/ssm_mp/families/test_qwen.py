from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from tests.families.tiny_models import written
from tests.ssm_mp.families.changed_folders import BY_NAME, Tensors, changed, held, same

NEXT, TEXT, BOTH, MOE = "qwen3_next/plain", "qwen3_5_text/plain", "qwen3_5/text-and-vision", "qwen3_5_moe_text/plain"
MANY = "qwen3_next/many-experts"
MTP = "mtp.layers.0.mlp.experts.0.up_proj.weight"
ORDER = ["linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize("case", [case for case in BY_NAME if case.startswith("qwen") and "vision" not in case])
def test_every_key_that_transformers_writes_is_known(tmp_path: Path, case: str) -> None:
    assert load_checkpoint(changed(case, tmp_path)).notes == ()


@pytest.mark.parametrize("case", [case for case in BY_NAME if "vision" in case])
def test_of_text_and_vision_the_note_says_what_is_left_out(tmp_path: Path, case: str) -> None:
    notes = load_checkpoint(changed(case, tmp_path)).notes
    assert len(notes) == 1
    assert notes[0].startswith("parts of a larger model that are not read: model.visual.blocks.0.attn.proj.bias")


def test_unknown_keys_are_noted_inside_and_outside(tmp_path: Path) -> None:
    inside = {**held(BOTH)[0]["text_config"], "loops": 3}
    notes = load_checkpoint(changed(BOTH, tmp_path, {"text_config": inside, "audio_config": {}})).notes
    assert notes[:2] == ("config.json: not used: audio_config", "text_config in config.json: not used: loops")


@pytest.mark.parametrize("case", [NEXT, TEXT, BOTH, MOE])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, case: str) -> None:
    without = load_checkpoint(changed(case, tmp_path))
    found = load_checkpoint(changed(case, tmp_path, tensors=lambda held: {**held, MTP: torch.ones(3, 4)}))
    assert found.digest == without.digest
    assert "parts of a larger model that are not read: " in found.notes[0]


@pytest.mark.parametrize(
    ("case", "key", "value", "expected"),
    [
        (NEXT, "hidden_size", 64, "48, as the tensors' shapes show"),
        (NEXT, "vocab_size", 100, "101, as"),
        (NEXT, "num_hidden_layers", 4, "3, as"),
        (NEXT, "head_dim", 32, "16, as"),
        (NEXT, "num_attention_heads", 8, "heads of 16 that make the 96 inputs of o_proj"),
        (NEXT, "num_attention_heads", None, "found nothing"),
        (NEXT, "num_key_value_heads", 3, "heads of 16 that make .* the 32 rows of k_proj"),
        (NEXT, "linear_num_value_heads", 8, "4, as"),
        (NEXT, "linear_value_head_dim", 16, "14, as"),
        (NEXT, "linear_num_key_heads", 4, r"a product of 20, half of 96 channels less 4 · 14, found '4 · 10'"),
        (NEXT, "linear_num_key_heads", 3, "a divisor of the 4 value heads"),
        (NEXT, "linear_num_key_heads", None, "found nothing"),
        (NEXT, "linear_key_head_dim", 20, "a product of 20"),
        (NEXT, "linear_conv_kernel_dim", 3, "4, as"),
        (NEXT, "moe_intermediate_size", 32, "24, as"),
        (NEXT, "shared_expert_intermediate_size", 32, "40, as"),
        (NEXT, "num_experts", 6, "5, as"),
        (NEXT, "num_experts_per_tok", 6, "at most the 5 experts"),
        (NEXT, "num_experts_per_tok", None, "found nothing"),
        (NEXT, "mlp_only_layers", [0], r"leaves out experts in layers \[\]"),
        (NEXT, "decoder_sparse_step", 2, r"leaves out experts in layers \[\]"),
        ("qwen3_next/not-normalised", "intermediate_size", 64, "72, as"),
        (NEXT, "layer_types", [*ORDER[:2], "sliding_attention"], "found 'sliding_attention'"),
        (NEXT, "layer_types", ORDER[:2], "3 layers.*2 layers"),
        (NEXT, "layer_types", ORDER[::-1][1:] + ORDER[:1], "'delta', as the tensors of layer 0 show"),
        (NEXT, "rope_parameters", {"rope_type": "spiral"}, "'default', 'linear', 'llama3' or 'yarn'"),
        (NEXT, "sliding_window", 64, "sliding window is not computed"),
        (NEXT, "use_sliding_window", True, "sliding window is not computed"),
        (NEXT, "hidden_act", "gelu", "'silu' or 'swish'"),
        (TEXT, "intermediate_size", 64, "72, as"),
        (TEXT, "linear_num_value_heads", 8, "4, as"),
        (MOE, "num_experts", 4, "5, as"),
        (MANY, "num_experts", 17, "18, as"),
        (MANY, "moe_intermediate_size", 17, "24, as"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_one_error(
    tmp_path: Path, case: str, key: str, value: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}.*{expected}") as caught:
        load_checkpoint(changed(case, tmp_path, {key: value}))
    assert "\n" not in str(caught.value)


def test_a_config_within_one_is_named_where_it_is_wrong(tmp_path: Path) -> None:
    inside = {**held(BOTH)[0]["text_config"], "hidden_size": 64}
    with pytest.raises(CheckpointError, match=r"text_config in config\.json: hidden_size: expected 48.*found 64"):
        load_checkpoint(changed(BOTH, tmp_path, {"text_config": inside}))


def test_a_folder_without_a_config_asks_for_it(tmp_path: Path) -> None:
    (changed(NEXT, tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json, which is not there: linear_num_key_heads: expected a"):
        load_checkpoint(tmp_path)


def test_words_of_configs_on_the_hub_are_known(tmp_path: Path) -> None:
    hub: dict[str, Any] = {
        "layer_types": None, "full_attention_interval": 4, "rope_parameters": None, "rope_theta": 1e4,
        "partial_rotary_factor": 0.25, "rope_scaling": None, "use_sliding_window": False, "max_window_layers": 3,
        "attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mlp_only_layers": [],
        "mtp_use_dedicated_embeddings": False,
    }  # fmt: skip
    (tmp_path / "new").mkdir()
    found = load_checkpoint(changed(TEXT, tmp_path, hub))
    assert found.notes == ()
    assert found.config == load_checkpoint(changed(TEXT, tmp_path / "new")).config


def test_positions_in_three_directions_are_those_of_text(tmp_path: Path) -> None:
    three = {**held(TEXT)[0]["rope_parameters"], "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    (tmp_path / "new").mkdir()
    found = load_checkpoint(changed(TEXT, tmp_path, {"rope_parameters": three}))
    assert found.config == load_checkpoint(changed(TEXT, tmp_path / "new")).config


def test_whether_the_head_is_tied_is_said_outside(tmp_path: Path) -> None:
    def headless(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_checkpoint(changed(BOTH, tmp_path, tensors=headless))
    found = load_checkpoint(changed(BOTH, tmp_path, {"tie_word_embeddings": True}, headless))
    assert found.config.tied


def test_experts_of_unequal_number_are_refused(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.4.up_proj" not in name}

    with pytest.raises(CheckpointError, match=r"experts: expected as many experts .*up_proj\.weight of 4"):
        load_checkpoint(changed(NEXT, tmp_path, tensors=fewer))


@pytest.mark.parametrize("case", [NEXT, MANY])
def test_layers_with_unequal_numbers_of_experts_are_refused(tmp_path: Path, case: str) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        last = held(case)[0]["num_experts"] - 1
        return {name: tensor for name, tensor in tensors.items() if f".1.mlp.experts.{last}." not in name}

    expected = (
        r"as many experts in every layer that has any, found (5|18) of layers\.0\.mlp\.experts, (4|17) of layers\.1"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(changed(case, tmp_path, tensors=fewer))


@pytest.mark.parametrize("case", [NEXT, MANY, MOE])
def test_experts_are_read_as_transformers_has_them_in_memory(tmp_path: Path, case: str) -> None:
    expected = load_checkpoint(changed(case, tmp_path)).digest
    in_memory = BY_NAME[case].make().state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in in_memory
    assert load_checkpoint(changed(case, tmp_path, tensors=lambda _: _apart(in_memory))).digest == expected


def _apart(tensors: dict[str, Tensor]) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", [NEXT, TEXT, BOTH])
def test_shards_are_the_same_model(tmp_path: Path, case: str) -> None:
    (tmp_path / "whole").mkdir()
    shards = load_checkpoint(written(BY_NAME[case], tmp_path / "shards", shard_size="40KB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert shards.digest == load_checkpoint(changed(case, tmp_path / "whole")).digest


@pytest.mark.parametrize("case", [NEXT, TEXT])
def test_bfloat16_is_the_same_model_rounded(tmp_path: Path, case: str) -> None:
    (tmp_path / "whole").mkdir()
    half = load_checkpoint(written(BY_NAME[case], tmp_path / "half", dtype=torch.bfloat16))
    whole = load_checkpoint(changed(case, tmp_path / "whole"))
    assert half.config == whole.config
    assert same(half.tensors, {name: tensor.bfloat16().float() for name, tensor in whole.tensors.items()})


def test_other_files_beside_are_no_trouble(tmp_path: Path) -> None:
    changed(BOTH, tmp_path)
    for name in ("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    assert len(load_checkpoint(tmp_path).notes) == 1


def test_the_text_of_two_is_the_same_model_as_text_alone(tmp_path: Path) -> None:
    def text(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if ".visual." not in name}
        return {name.replace("language_model.", ""): tensor for name, tensor in kept.items()}

    (tmp_path / "both").mkdir()
    alone = changed(BOTH, tmp_path, tensors=text)
    (alone / "config.json").write_text((changed(TEXT, tmp_path / "both") / "config.json").read_text())
    found = load_checkpoint(alone)
    assert found.notes == ()
    assert found.digest == load_checkpoint(changed(BOTH, tmp_path / "both")).digest
