"""What `benchmarks.inference` compares, and how its figures follow from the times."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.inference import cpu_flags, measure, to_json
from benchmarks.inference_models import CASES, CONVERTED, Case, boundaries_of, convert_all, winner_by_rule, winner_of
from benchmarks.inference_peers import find_peers, require_near
from benchmarks.inference_ways import in_turn, over_rivals, summarise
from benchmarks.memory import measure_apart
from benchmarks.shapes import initial_tensors, random_windows
from ssm_mp.artifact import save_artifact
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.decoding.decode import prefill
from ssm_mp.families.itera import IteraConfig
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import HUGGING_FACE, ITERA, MAMBA

LONG = 128
"""Tokens of the windows that conversions are calibrated on."""


def checkpoint_of(config: MambaConfig | IteraConfig) -> Checkpoint:
    return Checkpoint(Path("tiny"), "canonical", config, initial_tensors(config))


def case_of(config: MambaConfig | IteraConfig, **changes: object) -> Case:
    made = Case(lambda: checkpoint_of(config), 16, 4, 1, ("fp16", "int8-static", "int4"), ("int8-static", "int4"))
    return replace(made, **changes)  # type: ignore[arg-type]


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


def test_ours_are_held_against_the_faster_of_each_rival_round_by_round() -> None:
    seconds = {
        "fp32": [1.0, 1.0, 1.0],
        "int8-dynamic": [1.0, 2.0, 4.0],
        "nf4": [1.0, 1.0, 1.0],
        "torchao": [4.0, 8.0, 16.0],
        "torchao-freezing": [2.0, 4.0, 12.0],
        "llama.cpp-int4": [2.0, 3.0, 4.0],
    }
    assert over_rivals(seconds) == {"int8-dynamic": {"torchao": 2.0}, "nf4": {"llama.cpp-int4": 3.0}}


def test_ways_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def once(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn({"a": lambda: once("a"), "b": lambda: once("b")}, 2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_winner_by_rule_keeps_convolutions_at_fp16_and_no_projection() -> None:
    converted = convert_all(checkpoint_of(HUGGING_FACE), CONVERTED)
    assert tuple(converted) == CONVERTED
    held = converted["winner"].map.to_json()
    assert {name for name, precision in held.items() if precision == "int8" and "proj" not in name} == {"embedding"}
    assert all(precision == "int8" for name, precision in held.items() if name.endswith("_proj"))
    assert converted["int8-dynamic"].scheme.activations == "dynamic"
    assert convert_all(checkpoint_of(HUGGING_FACE), ("winner",), converted["fp16"])["winner"] is converted["fp16"]


def test_the_winner_below_8_bits_has_its_embedding_in_the_blocks_of_the_study() -> None:
    boundaries = boundaries_of(CASES["cumulative"])
    config = MambaConfig(boundaries[-1] + 8, 16, 32, 4, 2, 4, 1)
    converted = convert_all(checkpoint_of(config), ("winner",), None, "cpu", boundaries)["winner"]
    held = converted.map.to_json()
    assert [held[f"embedding.blocks.{b}"] for b in range(4)] == ["nf4g128"] * 3 + ["nf3g128"]
    assert held["layers.0.ssm.in_proj"] == held["layers.0.ssm.conv1d"] == "nf4"
    assert held["layers.0.ssm.out_proj"] == "nf4g128"
    assert boundaries_of(CASES["reference"]) == ()


def test_a_run_has_the_winner_that_was_saved_in_it(tmp_path: Path) -> None:
    assert winner_of(tmp_path) is None
    (tmp_path / "winner").mkdir()
    assert winner_of(tmp_path) is None
    (tmp_path / "winner").rmdir()
    converter = Converter(build(MAMBA, initial_tensors(MAMBA)), Scheme(activations="none"))
    chosen = PrecisionMap.uniform("int8", converter.components)
    save_artifact(tmp_path / "winner", converter.convert(chosen), chosen, converter.scheme, {})
    found = winner_of(tmp_path)
    assert found is not None
    assert (found.map, found.scheme) == (chosen, converter.scheme)


def test_every_case_is_of_a_model_that_its_ways_and_rivals_can_be_made_of() -> None:
    for case in CASES.values():
        assert set(case.exported) <= set(case.ways) <= set(CONVERTED)
        assert case.prompt // 4 >= case.steps
    assert 1.6e6 < sum(t.numel() for t in CASES["itera"].load().tensors.values()) < 1.8e6


def test_experts_are_measured_without_peers_that_know_none(tmp_path: Path) -> None:
    config = replace(ITERA, max_length=LONG)
    found = measure("itera", case_of(config), tmp_path, "cpu", 1, with_memory=False)
    assert set(found["prefill"]) == set(found["decode"]) == {"fp32", "fp16", "int8-static", "int4"}
    assert all(row["tokens_per_second"] > 0 for row in found["decode"].values())
    assert set(found["left_out"]) == {"torchao", "llama.cpp-int8", "llama.cpp-int4"}
    assert found["exported"] == {}
    assert set(to_json({"itera": found})["speedup"]["itera"]) == {"fp16", "int8-static", "int4"}


def test_llama_cpp_takes_turns_on_the_exported_map(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    config = MambaConfig(96, 32, 64, 16, 32, 4, 2)
    found = measure("tiny", case_of(config), tmp_path, "cpu", 1, with_memory=False)
    assert set(found["prefill"]) == {"fp32", "fp16", "int8-static", "int4", "llama.cpp-int8", "llama.cpp-int4"}
    assert found["decode"]["llama.cpp-int8"]["tokens_per_second"] > 0
    assert set(found["over_rivals"]["decode"]) == {"int8-static", "int4"}
    assert found["exported"]["llama.cpp-int4"]["components"]["Q4_0"] == 1 + 4 * config.n_layers
    assert "verified by llama.cpp" in found["exported"]["llama.cpp-int8"]["verdict"]


def test_llama_cpp_that_computes_another_model_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    config = MambaConfig(96, 32, 64, 16, 32, 4, 2)
    case, checkpoint = case_of(config), checkpoint_of(config)
    converted = convert_all(checkpoint, case.ways)
    ids = random_windows(96, 1, 16).ids
    expected = prefill(build(config, checkpoint.tensors), ids).logits
    monkeypatch.setattr("benchmarks.llama_cpp.Served.logits", lambda served: -expected[0].numpy())
    with ExitStack() as stack, pytest.raises(RuntimeError, match="llama.cpp-int8's prefill: logits are"):
        find_peers(case, checkpoint, converted, expected, ids, stack, 1)


def test_logits_must_be_near() -> None:
    require_near(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), 0.1, "it")
    for wrong in (torch.tensor([2.0, 1.0]), torch.tensor([float("nan"), 2.0])):
        with pytest.raises(RuntimeError):
            require_near(wrong, torch.tensor([1.0, 2.0]), 0.1, "it")


def test_json_has_a_speedup_for_each_case_way_and_phase() -> None:
    ways = {way: {"speedup": 1.5, "tokens_per_second": 3.0} for way in ("fp32", *CONVERTED)}
    found = to_json({"130m": {"prefill": ways, "decode": ways, "memory": {}}})
    assert found["speedup"] == {"130m": {way: {"prefill": 1.5, "decode": 1.5} for way in CONVERTED}}


def test_flags_of_the_processor_are_those_that_it_says(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: some avx512f\nflags\t\t: fpu avx2 avx512_vnni\n")
    assert cpu_flags(tmp_path / "cpuinfo") == ["avx2", "avx512_vnni"]
    assert cpu_flags(tmp_path / "nothing") == []


def test_a_winner_by_rule_is_a_total_map() -> None:
    components = find_components(build(ITERA, initial_tensors(ITERA)))
    assert [name for name, _ in winner_by_rule(components)] == [component.name for component in components]


@pytest.mark.slow
def test_a_process_grows_by_at_least_the_model_that_it_loads(tmp_path: Path) -> None:
    config = MambaConfig(40_000, 256, 64, 4, 2, 4, 1)
    save_file(initial_tensors(config), tmp_path / "model.safetensors")
    found = measure_apart(tmp_path / "model.safetensors")
    assert found["peak"] - found["before"] >= config.vocabulary * config.d_model * 4
    assert found["peak"] >= found["loaded"] > found["before"] > 0
