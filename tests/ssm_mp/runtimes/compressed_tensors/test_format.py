"""The hybrid reference as a packed folder, by transformers in a process of its own; what is held how and said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.components import find_components
from ssm_mp.runtimes.compressed_tensors.format import COMPRESSED_TENSORS
from ssm_mp.runtimes.verify import unequal_weights
from tests.families.models import checkpoint_of as tiny_of
from tests.ssm_mp.runtimes.checking import checked, item_of, mixed_rules
from tests.ssm_mp.runtimes.folders import checkpoint_of

HYBRID = Path(__file__).parents[4] / "studies" / "hybrid"


def test_the_hybrid_reference_is_confirmed_by_transformers(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(HYBRID)
    rules = mixed_rules(COMPRESSED_TENSORS, checkpoint, "int4", "int8")
    done = checked(
        COMPRESSED_TENSORS, item_of(checkpoint, rules, (HYBRID / "tokenizer.json").read_bytes()), tmp_path
    )  # fmt: skip
    assert done.verdict is not None
    assert done.verdict.mean_kl < 1e-6
    assert (done.path / "tokenizer_config.json").exists()


def test_vllm_is_offered_where_the_layers_that_it_joins_are_packed_alike(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("lfm2")
    same = item_of(checkpoint, {"*": "fp16", "*.q_proj": "int8", "*.k_proj": "int8", "*.v_proj": "int8"})
    assert COMPRESSED_TENSORS.command(tmp_path, same) == f"vllm serve {tmp_path} --skip-tokenizer-init"
    assert COMPRESSED_TENSORS.command(tmp_path, replace(same, tokenizer=b"{}")) == f"vllm serve {tmp_path}"
    for rule in ("*.k_proj", "*.w3"):
        other = item_of(checkpoint, {"*": "fp16", rule: "int8"})
        assert "from_pretrained" in COMPRESSED_TENSORS.command(tmp_path, other)
    wide = item_of(checkpoint, {"*": "fp16", "*.w1": "int8", "*.w3": "int5"})  # both in 8 bits, but in other groups
    assert "from_pretrained" in COMPRESSED_TENSORS.command(tmp_path, wide)
    three = item_of(checkpoint, {"*": "fp16", "*.w1": "int4", "*.w3": "int3"})
    assert COMPRESSED_TENSORS.command(tmp_path, three).startswith(f"vllm serve {tmp_path}")


def test_precisions_that_a_component_cannot_have() -> None:
    def encodings(name: str, ending: str) -> dict[str, str | None]:
        checkpoint = tiny_of(name) if "/" in name else checkpoint_of(name)
        part = next(part for part in find_components(checkpoint) if part.name.endswith(ending))
        found = {
            precision: COMPRESSED_TENSORS.encoding(part, precision, checkpoint.config)
            for precision in ("fp16", "int8", "int6", "int5", "int4", "int3", "nf4")
        }
        return {precision: None if encoding is None else encoding.word for precision, encoding in found.items()}

    none = dict.fromkeys(("int8", "int6", "int5", "int4", "int3", "nf4"))
    of_32, wide = "W4, groups of 32", "W8, groups of 32"
    assert encodings("granite", "in_proj") == {
        "fp16": "F16", "int8": "W8, a scale a row", "int6": wide, "int5": wide, "int4": of_32, "int3": of_32,
        "nf4": None,
    }  # fmt: skip
    assert encodings("bamba/plain", "in_proj") == {"fp16": "F16", **none, "int8": "W8, a scale a row"}  # 48 columns
    assert encodings("granite", "embedding") == {"fp16": "F16", **none}
    assert encodings("granite-experts", "router.layer") == {"fp16": "F16", **none}
    assert encodings("granite-experts", "experts.input_linear") == {"fp16": "F16", **none}
    assert encodings("granitemoehybrid/experts", "experts.1.input_linear") == {"fp16": "F16", **none}
    assert encodings("granite", "conv1d") == {"fp16": "F16", **dict.fromkeys(none, "F32")}
    assert "embedding_blocks" in str(
        COMPRESSED_TENSORS.refusal(checkpoint_of("lfm2").config.replaced(embedding_blocks=(50, 51)))
    )


def test_each_packed_layer_is_in_one_group_and_each_other_one_is_ignored(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("nemotron_h")
    item = item_of(checkpoint, mixed_rules(COMPRESSED_TENSORS, checkpoint, "int8", "int4", "fp16"))
    COMPRESSED_TENSORS.write(item, tmp_path / "m")
    quantization = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    targets = [target[3:] for group in quantization["config_groups"].values() for target in group["targets"]]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        module = module.replace("backbone.", "model.")
        if leaf == "weight_packed":
            assert len([target for target in targets if re.fullmatch(target, module)]) == 1
        elif leaf == "weight" and tensor.dim() == 2:
            assert module in quantization["ignore"]
            assert not any(re.fullmatch(target, module) for target in targets)


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight"])
def test_a_changed_tensor_is_found(leaf: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("granite")
    item = item_of(checkpoint, mixed_rules(COMPRESSED_TENSORS, checkpoint, "int4"))
    COMPRESSED_TENSORS.write(item, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f".{leaf}"))
    changed = tensors[name].clone()
    changed.view(torch.uint8).flatten()[1:2] ^= 1
    save_file({**tensors, name: changed}, tmp_path / "m" / "model.safetensors")
    problems = unequal_weights(COMPRESSED_TENSORS, item, tmp_path / "m")
    assert len(problems) == 1
    assert problems[0].startswith(name.rpartition(".")[0])
