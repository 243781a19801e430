"""Launching: what is refused, what is left behind, what is said. The queue itself is tested on a private Slurm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.run.launch import FAILED, LAUNCH, idle_gpu_note, require_not_failed, submit_study
from ssm_mp.errors import MachineError


def spec_of(folder: Path, *overrides: str) -> StudySpec:
    study = folder / "x.toml"
    study.write_text('[checkpoint]\npath = "m.pt"\n')
    return load_spec(study, overrides)


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put programs of these names, and no others, on PATH."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin" if scripts else str(folder))


def submit(spec: StudySpec, run: RunDirectory) -> dict[str, object]:
    return submit_study(spec, run, ["x.toml"], 3, lambda line: None)


def test_a_launch_is_written_down_and_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, sbatch="echo $$", squeue="exit 0")
    run = RunDirectory(tmp_path / "run")
    answer = submit(spec_of(tmp_path), run)
    jobs = answer["jobs"]
    assert isinstance(jobs, dict)
    assert list(jobs) == ["prepare", "search", "finish"]
    assert run.read_json(LAUNCH)["jobs"] == jobs
    assert answer["cancel"] == f"scancel {' '.join(jobs.values())}"
    assert answer["status"] == "ssm-mp status x.toml"
    assert run.read_json("storage.json")["kind"] == "journal"


@pytest.mark.parametrize(("scripts", "error"), [({}, MachineError), ({"sbatch": "echo no >&2; exit 1"}, StudyError)])
def test_a_launch_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], error: type[Exception]
) -> None:
    programs(tmp_path / "bin", monkeypatch, **scripts)
    with pytest.raises(error):
        submit(spec_of(tmp_path), RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_launch_beside_a_living_one_is_refused_and_beside_a_finished_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "listing"
    programs(tmp_path / "bin", monkeypatch, sbatch="echo 7", squeue=f"cat {listing}")
    run = RunDirectory(tmp_path / "run")
    listing.write_text("")
    submit(spec_of(tmp_path), run)
    line = f"{'7':<32}{'2':<24}{'9':<32}{{:<24}}{'0':<12}{'n1':<64}{'None':<80}\n"
    listing.write_text(line.format("RUNNING"))
    with pytest.raises(StudyError, match="launched already.*scancel 7 7 7"):
        submit(spec_of(tmp_path), run)
    listing.write_text(line.format("CANCELLED"))
    submit(spec_of(tmp_path), run)


def test_a_failed_preparation_stops_workers_until_the_next_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, sbatch="echo 7", squeue="exit 0")
    run = RunDirectory(tmp_path / "run")
    require_not_failed(run)
    run.path.mkdir()
    (run / FAILED).write_text(json.dumps({"error": "no checkpoint at m.pt"}))
    with pytest.raises(StudyError, match="preparing this study failed: no checkpoint at m.pt"):
        require_not_failed(run)
    submit(spec_of(tmp_path), run)
    require_not_failed(run)


def test_a_gpu_that_would_stay_idle_is_said(tmp_path: Path) -> None:
    note = idle_gpu_note(spec_of(tmp_path))
    assert note is not None
    assert "--gres=gpu:a30:1" in note
    assert idle_gpu_note(spec_of(tmp_path, "search.device=cuda")) is None
    assert idle_gpu_note(spec_of(tmp_path, "slurm.gres=false")) is None
