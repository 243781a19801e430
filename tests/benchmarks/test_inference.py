"""What `benchmarks.inference` compares, and how its figures follow from the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks.inference import CONVERTED, convert_all, in_turn, summarise, to_json, winner_of
from benchmarks.memory import measure_apart
from benchmarks.shapes import initial_tensors
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.families.mamba import MambaConfig
from tests.tiny import HUGGING_FACE


def test_speedups_are_over_fp32_and_torchaos_is_its_faster_way() -> None:
    seconds = {
        "fp32": [1.0, 2.0, 4.0],
        "fp16": [0.5, 1.0, 4.0],
        "torchao": [2.0, 4.0, 8.0],
        "torchao-freezing": [0.5] * 3,
    }
    found = summarise(seconds, 100)
    assert found["fp16"] == {"tokens_per_second": 100.0, "speedup": 2.0}
    assert found["torchao"]["speedup"] == 4.0
    assert found["torchao-default"]["speedup"] == 0.5


def test_ways_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def once(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn({"a": lambda: once("a"), "b": lambda: once("b")}, 2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_winner_by_rule_keeps_convolutions_at_fp16_and_no_projection() -> None:
    checkpoint = Checkpoint(Path("tiny"), "canonical", HUGGING_FACE, initial_tensors(HUGGING_FACE))
    converted = convert_all(checkpoint, None)
    assert tuple(converted) == CONVERTED
    held = converted["winner"].map.to_json()
    assert {name for name, precision in held.items() if precision == "int8" and "proj" not in name} == {"embedding"}
    assert all(precision == "int8" for name, precision in held.items() if name.endswith("_proj"))
    assert converted["int8-dynamic"].scheme.activations == "dynamic"
    given = converted["fp16"].map.to_json()
    assert convert_all(checkpoint, given)["winner"].map.to_json() == given


def test_a_run_without_a_winner_has_none(tmp_path: Path) -> None:
    assert winner_of(tmp_path) is None
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "precision_map.json").write_text(json.dumps({"map": {"embedding": "int8"}}))
    assert winner_of(tmp_path) == {"embedding": "int8"}
    (tmp_path / "winner" / "precision_map.json").write_text(json.dumps({"map": {"embedding.blocks.0": "int8"}}))
    assert winner_of(tmp_path) is None


def test_json_has_a_speedup_for_each_shape_way_and_phase() -> None:
    ways = {way: {"speedup": 1.5, "tokens_per_second": 3.0} for way in ("fp32", *CONVERTED)}
    found = to_json({"130m": {"prefill": ways, "decode": ways, "memory": {}}})
    assert found["speedup"] == {"130m": {way: {"prefill": 1.5, "decode": 1.5} for way in CONVERTED}}


@pytest.mark.slow
def test_a_process_grows_by_at_least_the_model_that_it_loads(tmp_path: Path) -> None:
    config = MambaConfig(40_000, 256, 64, 4, 2, 4, 1)
    save_file(initial_tensors(config), tmp_path / "model.safetensors")
    found = measure_apart(tmp_path / "model.safetensors")
    assert found["peak"] - found["before"] >= config.vocabulary * config.d_model * 4
    assert found["peak"] >= found["loaded"] > found["before"] > 0
