"""What an MLX folder cannot hold or mlx-lm does not compute is said with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.rotary import LinearStretch
from ssm_mp.components import find_components
from ssm_mp.runtimes.mlx.format import MLX
from tests.families.models import checkpoint_of as tiny_of
from tests.ssm_mp.runtimes.checking import item_of
from tests.ssm_mp.runtimes.folders import checkpoint_of


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba2/groups-2", "n_groups = 2"),
        ("falcon_h1/norm-then-gate", "n_groups = 2"),
        ("bamba/plain", "does not know"),
        ("jamba/experts", "softmax of the chosen"),
        ("jamba/dense", "jamba"),
        ("itera", "this project"),
    ],
)
def test_a_family_that_mlx_lm_computes_otherwise(name: str, why: str) -> None:
    checkpoint = tiny_of(name)
    assert why in str(MLX.refusal(checkpoint.config))
    assert why in str(MLX.refusal_of(item_of(checkpoint, {"*": "fp16"})))


def changed(name: str, kind: type[Block], **fields: Any) -> str | None:
    """What is said of a case with other values in its blocks of a kind."""
    config = checkpoint_of(name).config
    return MLX.refusal(config.rebuilt(lambda block: replace(block, **fields) if isinstance(block, kind) else block))


def test_options_that_mlx_lm_has_no_key_for() -> None:
    rotary = next(
        part.block.rotary
        for layer in checkpoint_of("lfm2").config.branches
        for branch in layer
        for part in branch.parts
        if isinstance(part.block, Attention)
    )
    assert rotary is not None
    assert "LinearStretch" in str(changed("lfm2", Attention, rotary=replace(rotary, stretch=LinearStretch(2.0))))
    assert "attention heads of 8" in str(changed("granite", Attention, head_dim=8))
    assert "bias" in str(changed("granite", Attention, o_bias=True))
    assert "bias" in str(changed("mamba2", Mamba2, out_bias=False))
    assert "time_step_limit" in str(changed("falcon_h1", Mamba2, dt_limits=(0.1, None)))
    assert "output gate" in str(changed("qwen3_5_text", Attention, output_gate=False))


def test_heads_norms_and_layers_that_mlx_lm_does_not_have() -> None:
    lfm2, nemotron, qwen = (checkpoint_of(name).config for name in ("lfm2", "nemotron_h", "qwen3_5_text"))
    assert "untied" in str(MLX.refusal(lfm2.replaced(tied=False)))
    assert "tied" in str(MLX.refusal(nemotron.replaced(tied=True)))
    assert "attention and Mamba-2" in str(MLX.refusal(nemotron.replaced(layers=nemotron.branches[:2])))
    assert "every n-th" in str(MLX.refusal(qwen.replaced(layers=qwen.branches[1:])))
    assert "no layer has attention" in str(MLX.refusal(qwen.replaced(layers=qwen.branches[:1])))
    mamba = checkpoint_of("mamba").config
    assert "layer_norm_epsilon" in str(MLX.refusal(mamba.replaced(norm_eps=1e-3)))
    assert "learned positions" in str(MLX.refusal(mamba.replaced(max_length=16, norm="layer")))


def test_an_embedding_in_blocks() -> None:
    assert "embedding_blocks" in str(MLX.refusal(checkpoint_of("lfm2").config.replaced(embedding_blocks=(50, 51))))


def test_precisions_that_a_component_cannot_have() -> None:
    def encodings(name: str, ending: str) -> dict[str, bool]:
        config = checkpoint_of(name).config if "/" not in name else tiny_of(name).config
        part = next(part for part in find_components(checkpoint_of(name)) if part.name.endswith(ending))
        return {
            precision: MLX.encoding(part, precision, config) is not None
            for precision in ("fp16", "int8", "int6", "int5", "int4", "int3", "nf4")
        }

    integers = ("int8", "int6", "int5", "int4", "int3")
    held = {"fp16": True, **dict.fromkeys(integers, True), "nf4": False}
    plain = {"fp16": True, **dict.fromkeys(integers, False), "nf4": False}
    assert encodings("mamba", "dt_proj") == held  # 32 columns
    assert encodings("mamba-untied-biases", "dt_proj") == plain  # 7 columns
    assert encodings("mamba", "embedding") == held
    assert encodings("nemotron_h-experts", ".gate") == plain
    assert encodings("granite-experts", "router.layer") == held
    assert encodings("granite", "conv1d") == dict.fromkeys(held, True)
    assert encodings("granite", "input_layernorm") == dict.fromkeys(held, True)
