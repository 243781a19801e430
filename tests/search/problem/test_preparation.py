"""Prepared scales in a run directory: chosen once, the same for every worker, and part of what a study is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from search.problem.preparation import PREPARED
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.conversion.prepare import Prepared
from tests.families.models import write_family_study

SOME = Prepared(
    (torch.tensor([1, -2, 0], dtype=torch.int8), torch.zeros(2, dtype=torch.int8)),
    {"layers.0.ssm.out_proj": torch.tensor([3, 0], dtype=torch.int8)},
)


def same(one: Prepared, other: Prepared) -> bool:
    return one.digest == other.digest and len(one.foldings) == len(other.foldings)


@pytest.mark.parametrize("prepared", [SOME, Prepared(SOME.foldings), Prepared(())])
def test_what_is_kept_is_what_is_read(prepared: Prepared, tmp_path: Path) -> None:
    PREPARED.of(tmp_path, {}, lambda: prepared, print)
    assert same(PREPARED.of(tmp_path, {}, lambda: pytest.fail("chosen again"), print), prepared)


def test_a_file_of_other_arrays_is_said_and_replaced(tmp_path: Path) -> None:
    odd = replace(PREPARED, arrays=lambda prepared: {**PREPARED.arrays(prepared), "exponents": np.zeros(99, np.int8)})
    odd.of(tmp_path, {}, lambda: SOME, print)
    said: list[str] = []
    assert same(PREPARED.of(tmp_path, {}, lambda: SOME, said.append), SOME)
    assert "damaged (99 exponents of 3 places); choosing scales again" in said[0]
    assert same(PREPARED.of(tmp_path, {}, lambda: pytest.fail("chosen again"), print), SOME)


def test_every_exponent_is_in_the_digest() -> None:
    other = Prepared(SOME.foldings, {"layers.0.ssm.out_proj": torch.tensor([3, 1], dtype=torch.int8)})
    assert other.digest != SOME.digest


def study(folder: Path, prepare: str | None) -> Path:
    folder.mkdir()
    extra = "" if prepare is None else f'[precision]\nprepare = "{prepare}"'
    return write_family_study(folder, "mamba", extra, windows=(24, 6, 8))


def test_a_study_without_preparation_has_the_fingerprint_that_it_had(tmp_path: Path) -> None:
    path = study(tmp_path / "plain", None)
    before = open_workspace(load_spec(path)).fingerprint()
    assert "prepared" not in before
    assert open_workspace(load_spec(study(tmp_path / "none", "none"))).fingerprint() == before


def test_a_second_worker_folds_what_the_first_one_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(study(tmp_path / "study", "scales"))
    first = open_workspace(spec, cache=tmp_path / "run")
    monkeypatch.setattr("search.problem.preparation.prepare", None)  # not asked a second time
    second = open_workspace(spec, cache=tmp_path / "run")
    assert first.fingerprint() == second.fingerprint()
    assert "prepared" in first.fingerprint()
    ids = torch.from_numpy(np.arange(12))[None]
    assert torch.equal(first.model(ids), second.model(ids))


def test_too_few_tokens_to_scale_inputs_are_said_with_how_many_windows_are_enough(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "study"
    path.mkdir()
    extra = '[precision]\nprepare = "scales"\nactivations = "static"'
    found = open_workspace(load_spec(write_family_study(path, "mamba", extra, windows=(24, 6, 8))), said.append)
    (note,) = [line for line in said if "not scaled" in line]
    windows = found.splits.calibration
    assert f"{windows.ids.numel():,} calibration tokens" in note
    assert f"calibration_windows = {-(-65_536 // windows.length)}" in note
    assert found.prepared is not None
    assert not found.prepared.inputs
