"""Searches that keep below a bound of memory find the very same as others, or say at once why they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from search.cli.main import app, main
from search.problem import memory
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from tests.tiny import ITERA, MAMBA, write_study

LITTLE = {"measured": 0.7, "none": 0.7, "gradient": 1.2}
"""GiB that one tiny layer at a time fits into, beside what a process takes, and not what maps share; by probes."""
CHOICES = 'precision.choices=["fp16","int8","nf4"]'


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files may lie in memory where tests run."""
    monkeypatch.setattr(memory, "_is_memory", lambda folder: False)


def found(study: Path, folder: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """A search's answer without what depends on time, and what it said."""
    settings = [part for one in ("search.trials=6", CHOICES, *overrides) for part in ("--set", one)]
    done = CliRunner().invoke(app, ["search", str(study), "--run-dir", str(folder), "--json", *settings])
    assert done.exit_code in (0, 1), done.output
    answer = json.loads(done.stdout)
    for gate in answer["gates"]:
        gate.pop("detail", None)
    return {key: answer[key] for key in ("baseline", "points", "front", "certificate") if key in answer}, done.stderr


@pytest.mark.parametrize("probe", ["measured", "gradient", "none"])
@pytest.mark.parametrize("config", [MAMBA, ITERA], ids=["mamba", "itera"])
def test_a_search_layer_by_layer_with_forms_in_the_scratch_folder_finds_the_same(
    tmp_path: Path, config: Config, probe: str
) -> None:
    study = write_study(tmp_path, config=config)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    whole, said = found(study, tmp_path / "whole", f'search.probe="{probe}"')
    bounded = (f'search.probe="{probe}"', f"search.memory_gib={LITTLE[probe]}", f'search.scratch="{scratch}"')
    layered, told = found(study, tmp_path / "layered", *bounded)
    assert "all of it held at once" in said
    assert "layer by layer" in told
    assert layered == whole
    assert not any(scratch.iterdir())


def test_a_checkpoint_in_bfloat16_gives_what_its_values_in_float32_do(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "full").mkdir()
    half, full = write_study(tmp_path / "half"), write_study(tmp_path / "full")
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "half/model.safetensors").items()}
    save_file(tensors, tmp_path / "half/model.safetensors")
    save_file({name: t.float() for name, t in tensors.items()}, tmp_path / "full/model.safetensors")
    ours, theirs = (open_workspace(load_spec(study, [CHOICES])) for study in (half, full))
    assert ours.fingerprint() == theirs.fingerprint()
    lowest = ours.space.lowest()
    ids = ours.splits.search.ids
    with torch.inference_mode():
        assert torch.equal(ours.converter.convert(lowest)(ids), theirs.converter.convert(lowest)(ids))


def test_a_file_that_goes_away_ends_a_search_layer_by_layer_with_one_error(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    settings = [f"search.memory_gib={LITTLE['none']}", "search.probe=none"]
    workspace = open_workspace(load_spec(study, settings))
    (tmp_path / "model.safetensors").unlink()
    after = workspace.model.after_layer
    assert after is not None
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it was there when its tensors were mapped"):
        after(workspace.model.layers[0])


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("search.memory_gib=0.01", 3, "too little memory for one layer at a time"),
        ("search.memory_gib=1000000", 2, "memory_gib = 1e+06, but "),
        ("search.memory_gib=0", 2, "memory_gib: input should be greater than 0"),
    ],
)
def test_a_bound_that_cannot_be_kept_is_one_error_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    code: int,
    said: str,
) -> None:
    study = write_study(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["ssm-mp", "search", str(study), "--run-dir", str(tmp_path / "run"), "--set", setting]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err
    assert ended.value.code == code
    assert said in lines
    assert lines.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_a_group_that_matches_nothing_is_refused_before_calibration_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, run = write_study(tmp_path), tmp_path / "run"
    setting = 'precision.groups=["*.in_prj"]'
    monkeypatch.setattr("sys.argv", ["ssm-mp", "search", str(study), "--run-dir", str(run), "--set", setting])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "matches no component; the nearest are 'layers.*.ssm.in_proj'" in said
    assert "calibrating" not in said
    assert not run.exists()
