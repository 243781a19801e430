from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search.base.errors import StudyError
from search.problem import memory
from search.problem.memory import GIB, Needs, needs_of, plan_memory, put_aside
from search.problem.spec import StudySpec, load_spec
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.components import find_components
from ssm_mp.errors import MachineError
from ssm_mp.evaluation.memory import Limit
from tests.tiny import LENGTH, MAMBA, write_checkpoint

NEEDS = Needs(checkpoint=14 * GIB, forms=26 * GIB, running=2 * GIB, layer=GIB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the machine allows; its disk has room, whatever that of the tests is."""
    monkeypatch.setattr(memory, "_free_bytes", lambda folder: 100 * GIB)
    monkeypatch.setattr(memory, "_is_memory", lambda folder: False)

    def allow(gib: float | None, who: str = "this machine has free") -> None:
        limit = None if gib is None else Limit(int(gib * GIB), who)
        monkeypatch.setattr(memory, "memory_limit", lambda: limit)

    allow(24)
    return allow


def study(tmp_path: Path, *overrides: str) -> StudySpec:
    path = tmp_path / "study.toml"
    path.write_text('[checkpoint]\npath = "model.safetensors"\n', encoding="utf-8")
    return load_spec(path, [f'search.scratch="{tmp_path}"', *overrides])


def test_a_model_that_fits_is_held_whole(tmp_path: Path, machine: Any) -> None:
    small = Needs(checkpoint=6 << 20, forms=5 << 20, running=20 << 20, layer=1 << 20)
    plan = plan_memory(study(tmp_path), small)
    assert (plan.layer_by_layer, plan.forms, plan.scratch) == (False, None, None)
    assert plan.bound >= small.all
    assert "held at once" in plan.sentence


@pytest.mark.parametrize("overrides", [(), ('search.objectives=["compression","perplexity","latency"]',)])
def test_a_small_model_is_not_refused_for_what_the_process_itself_takes(
    tmp_path: Path, machine: Any, overrides: tuple[str, ...]
) -> None:
    machine(0.5)
    small = Needs(checkpoint=6 << 20, forms=5 << 20, running=20 << 20, layer=1 << 20)
    assert not plan_memory(study(tmp_path, *overrides), small).layer_by_layer


def test_a_model_that_does_not_is_evaluated_layer_by_layer_below_the_bound(tmp_path: Path, machine: Any) -> None:
    plan = plan_memory(study(tmp_path), NEEDS)
    assert plan.layer_by_layer
    assert plan.forms is not None
    assert plan.forms + plan.shared + NEEDS.least <= plan.bound <= 0.9 * 24 * GIB
    assert plan.scratch is not None
    assert "layer by layer" in plan.sentence
    assert str(tmp_path) in plan.sentence


@pytest.mark.parametrize("gib", [4.0, 6.0, 12.5])
def test_the_bound_asked_for_is_kept(tmp_path: Path, machine: Any, gib: float) -> None:
    plan = plan_memory(study(tmp_path, f"search.memory_gib={gib}"), NEEDS)
    assert plan.bound == int(gib * GIB)
    assert plan.forms is not None
    assert plan.forms + plan.shared + NEEDS.least <= plan.bound


def test_more_than_a_control_group_allows_is_refused_before_anything_runs(tmp_path: Path, machine: Any) -> None:
    machine(16, "this job's control group allows")
    with pytest.raises(StudyError, match=r"memory_gib = 32, but this job's control group allows 16\.0 GiB.*\[slurm\]"):
        plan_memory(study(tmp_path, "search.memory_gib=32"), NEEDS)


def test_one_of_several_processes_keeps_below_its_share(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(memory.SHARE, str(6 * GIB))
    assert plan_memory(study(tmp_path), NEEDS).bound == int(0.9 * 6 * GIB)
    with pytest.raises(
        StudyError, match=r"memory_gib = 8, but each process of this search \(--workers\) may take 6\.0"
    ):
        plan_memory(study(tmp_path, "search.memory_gib=8"), NEEDS)


def test_too_little_for_one_layer_says_what_would_fit(tmp_path: Path, machine: Any) -> None:
    with pytest.raises(MachineError, match=r"takes about 3\.6 GiB .*memory_gib allows 2\.0 GiB; give more, or fewer"):
        plan_memory(study(tmp_path, "search.memory_gib=2"), NEEDS)


def test_a_scratch_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, machine: Any) -> None:
    with pytest.raises(MachineError, match=r"missing: the scratch folder cannot be written .*\[search\] scratch"):
        plan_memory(study(tmp_path, f'search.scratch="{tmp_path}/missing"'), NEEDS)


def test_a_scratch_folder_that_is_too_small_is_refused_at_once(tmp_path: Path, machine: Any) -> None:
    with pytest.raises(MachineError, match=r"may take .* GB of this scratch folder, which may take 1\.1 GB"):
        plan_memory(study(tmp_path, "search.scratch_gib=1"), NEEDS)


def test_a_disk_that_is_too_full_is_refused_with_what_it_has(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda folder: 10**9)
    with pytest.raises(
        MachineError, match=r"may take .* GB of this scratch folder, which has 1\.0 GB free; give another"
    ):
        plan_memory(study(tmp_path), NEEDS)


def test_a_scratch_folder_in_memory_is_refused(tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_is_memory", lambda folder: True)
    with pytest.raises(MachineError, match="lies in memory, which it is to save"):
        plan_memory(study(tmp_path), NEEDS)


def test_a_scratch_folder_is_not_asked_for_before_something_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", MAMBA))
    monkeypatch.setattr(memory, "_LARGE", 0)
    place = put_aside(study(tmp_path, f'search.scratch="{tmp_path}/missing"'), checkpoint)
    assert place is not None
    with pytest.raises(MachineError, match="missing: the scratch folder cannot be written"):
        place(torch.ones(3))


def test_without_a_limit_the_multiple_of_the_checkpoint_is_the_bound(tmp_path: Path, machine: Any) -> None:
    machine(None)
    assert plan_memory(study(tmp_path), NEEDS).bound == int(1.5 * NEEDS.checkpoint) + 6 * GIB // 5


def test_needs_grow_with_windows_choices_and_the_models_size(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", MAMBA))
    components = find_components(checkpoint)
    base = needs_of(study(tmp_path), checkpoint, components, LENGTH)
    assert base.checkpoint == checkpoint.file_bytes
    assert base.forms == sum(c.bytes(p, "static") for c in components for p in ("fp16", "int8"))
    more = needs_of(study(tmp_path, 'precision.choices=["fp16","int8","nf4"]'), checkpoint, components, LENGTH)
    assert more.forms > base.forms
    assert replace(more, forms=base.forms) == base
    assert needs_of(study(tmp_path, "data.certify_windows=4096"), checkpoint, components, LENGTH).running > base.running


def test_probes_that_are_measured_need_both_ends_states_and_divergence_those_of_fp32(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", MAMBA))
    measured, none, judged = (
        needs_of(study(tmp_path, *keys), checkpoint, find_components(checkpoint), LENGTH).running
        for keys in (["search.probe=measured"], ["search.probe=none"], ["search.probe=none", "search.metric=kl"])
    )
    states = 4 * max(study(tmp_path).data.search_windows, study(tmp_path).data.certify_windows) * LENGTH * MAMBA.d_model
    assert measured - none == 3 * states
    assert judged - none == states
    heads = 2 * 6 * MAMBA.vocabulary * MAMBA.d_model  # laid out whole, where the winner is held against FP32
    assert none >= 3 * states + heads
