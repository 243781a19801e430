"""What GGUF says it can hold, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import Component, find_components
from ssm_mp.conversion.embedding_blocks import with_blocks
from ssm_mp.conversion.regroup import regrouped
from ssm_mp.errors import ExportError
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.runtimes.gguf.format import GGUF
from ssm_mp.runtimes.gguf.keys import keys_of
from ssm_mp.runtimes.gguf.layout import layout_of
from tests.families.models import checkpoint_of as of_all_families
from tests.families.tiny_models import written
from tests.ssm_mp.runtimes.checking import item_of
from tests.ssm_mp.runtimes.gguf.models import case_of, checkpoint_of

REFERENCE = Path(__file__).parents[4] / "studies/reference"


def component(checkpoint: Checkpoint, name: str) -> Component:
    return next(one for one in find_components(checkpoint) if one.name == name)


@pytest.mark.parametrize(
    ("precision", "word", "bits"),
    [("fp16", "F16", 16.0), ("int8", "Q8_0", 8.5), ("int6", "Q8_0", 8.5), ("int5", "Q5_0", 5.5), ("int4", "Q4_0", 4.5)],
)
def test_a_matrix_has_the_type_of_its_precision(precision: str, word: str, bits: float) -> None:
    checkpoint = checkpoint_of("granitemoehybrid/dense")
    matrix = component(checkpoint, "layers.0.mamba.in_proj")

    found = GGUF.encoding(matrix, precision, checkpoint.config)

    assert found is not None
    assert (found.word, found.bytes, found.note) == (word, matrix.count * bits / 8, "")


@pytest.mark.parametrize("name", ["layers.0.mamba.conv1d", "layers.0.mamba.A_log", "layers.0.mamba.norm", "norm"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int6", "int5", "nf4", "int3"])
def test_what_is_float32_there_is_so_at_every_precision(name: str, precision: str) -> None:
    checkpoint = checkpoint_of("granitemoehybrid/dense")
    small = component(checkpoint, name)

    found = GGUF.encoding(small, precision, checkpoint.config)

    assert found is not None
    assert (found.word, found.bytes) == ("F32", 4 * small.count)


def test_a_bias_that_llama_cpp_wants_and_the_model_has_not_is_counted() -> None:
    checkpoint = checkpoint_of("mamba2/no-convolution-bias")
    convolution = component(checkpoint, "layers.0.mixer.conv1d")

    found = GGUF.encoding(convolution, "fp16", checkpoint.config)

    channels = convolution.parameters[0].shape[0]
    assert found is not None
    assert found.bytes == 4 * (convolution.count + channels)


def test_rows_that_blocks_do_not_divide_are_held_as_float16_only() -> None:
    checkpoint = checkpoint_of("mamba/plain", time_step_rank=24)
    narrow = component(checkpoint, "layers.0.ssm.dt_proj")

    assert GGUF.encoding(narrow, "fp16", checkpoint.config) is not None
    assert [GGUF.encoding(narrow, name, checkpoint.config) for name in ("int8", "int6", "int5", "int4", "int3")] == [
        None
    ] * 5


def test_nf4_is_held_by_no_matrix() -> None:
    checkpoint = checkpoint_of("mamba/plain")

    assert GGUF.encoding(component(checkpoint, "embedding"), "nf4", checkpoint.config) is None


def test_multipliers_that_go_into_the_weights_are_noted() -> None:
    checkpoint = checkpoint_of("falcon_h1/gate-then-norm")

    notes = {
        name: getattr(GGUF.encoding(component(checkpoint, name), "int8", checkpoint.config), "note", None)
        for name in ("embedding", "layers.0.mamba.in_proj", "layers.0.feed_forward.up_proj", "norm")
    }

    assert "has no key for" in str(notes["embedding"])
    assert "has no key for" in str(notes["layers.0.mamba.in_proj"])
    assert notes["layers.0.feed_forward.up_proj"] == notes["norm"] == ""


_UNKNOWN: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("mamba/plain", {"expand": 3}, "twice as wide"),
    ("mamba/plain", {"use_bias": True}, "no biases of in_proj"),
    ("mamba/plain", {"conv_kernel": 1}, "at least 2 tokens"),
    ("mamba2/plain", {"use_bias": True}, "no biases of in_proj"),
    ("mamba2/plain", {"time_step_limit": (0.05, 0.4)}, r"within 0\.05 to 0\.4"),
    ("nemotron_h/dense", {"time_step_min": 0.1}, r"within 0\.1 to infinity"),
    ("nemotron_h/experts", {"hybrid_override_pattern": "M*-E"}, "layer 2 is one"),
    ("nemotron_h/experts", {"hybrid_override_pattern": "ME"}, "has layers with attention"),
    ("nemotron_h/experts", {"mlp_bias": True}, "no biases of feed-forwards"),
    ("falcon_h1/gate-then-norm", {"mamba_norm_before_gate": True}, "norm_first"),
    ("falcon_h1/gate-then-norm", {"attention_bias": True}, "no bias of attention's output"),
    ("lfm2/plain", {"conv_bias": True}, "no biases of short convolutions"),
    ("jamba/dense", {"mamba_proj_bias": True}, "no biases of in_proj"),
    (
        "granitemoehybrid/rope",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
        "only linear ones",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("name", "options", "said"), _UNKNOWN, ids=lambda value: str(value)[:40])
def test_what_llama_cpp_does_not_compute_is_refused_by_name(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    checkpoint = load_checkpoint(written(case_of(name, **options), tmp_path))

    assert re.search(said, str(GGUF.refusal(checkpoint.config)))
    assert GGUF.encoding(find_components(checkpoint)[0], "fp16", checkpoint.config) is None
    with pytest.raises(ExportError, match=said):
        GGUF.write(item_of(checkpoint, {"*": "fp16"}), tmp_path / "model.gguf")


def test_the_layout_with_learned_positions_is_refused() -> None:
    assert "learned positions" in str(GGUF.refusal(load_checkpoint(REFERENCE).config))


def test_a_layer_norm_is_refused() -> None:
    config = MambaConfig(101, 32, 64, 8, 32, 4, 2, norm="layer")

    assert "LayerNorms" in str(GGUF.refusal(config))


def test_a_family_without_an_architecture_is_refused_with_those_that_have_one() -> None:
    refusal = GGUF.refusal(of_all_families("itera").config)

    assert "'itera'" in str(refusal)
    assert "granitemoehybrid" in str(refusal)


def test_a_search_is_refused_where_experts_are_a_component_each() -> None:
    refusal = GGUF.refusal(checkpoint_of("granitemoehybrid/experts").config)

    assert "ffn_gate_exps" in str(refusal)
    assert '[precision] experts = "together"' in str(refusal)
    assert GGUF.refusal(regrouped(checkpoint_of("granitemoehybrid/experts"), "together").config) is None


def test_a_search_is_refused_where_in_proj_is_split() -> None:
    checkpoint = regrouped(checkpoint_of("mamba2/plain"), split=("in_proj",))

    assert "no [precision] split" in str(GGUF.refusal(checkpoint.config))


def test_experts_of_several_precisions_are_refused_by_name(tmp_path: Path) -> None:
    expert = "layers.1.block_sparse_moe.experts.3.input_linear"
    item = item_of(checkpoint_of("granitemoehybrid/experts"), {"*": "fp16", expert: "int8"})

    refusal = GGUF.refusal_of(item)

    assert f"{expert} int8" in str(refusal)
    with pytest.raises(ExportError, match="one tensor of one type"):
        GGUF.write(item, tmp_path / "model.gguf")


def test_an_embedding_in_blocks_is_refused() -> None:
    checkpoint = checkpoint_of("mamba2/plain")
    config = with_blocks(checkpoint.config, (50,))

    assert "embedding_blocks" in str(GGUF.refusal(config))
    assert GGUF.encoding(find_components(checkpoint)[0], "fp16", config) is None


def test_keys_say_which_layers_have_attention() -> None:
    config = checkpoint_of("bamba/plain").config

    keys = dict(keys_of(layout_of(config).architecture, config, "tiny"))

    assert keys["granitehybrid.attention.head_count_kv"] == [0, 2, 0]
    assert keys["granitehybrid.rope.dimension_count"] == 8
    assert keys["granitehybrid.context_length"] == 128
    assert keys["general.name"] == "tiny"
