"""A preparation that is killed at any step goes on after the last thing that was finished, and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.problem.run_directory import BASELINE, FINGERPRINT, GRADIENTS, PROBES, RunDirectory
from search.problem.spec import load_spec
from search.run import ends, gradients, prepare
from tests.tiny import write_study

ROOT = Path(__file__).parents[3]
EXTRA = '[precision]\nchoices = ["fp16", "int8"]\npin = ["layers.1.*"]\n'


@pytest.mark.parametrize("probe", ["none", "gradient", "measured"])
def test_nothing_that_was_finished_is_measured_again(tmp_path: Path, probe: str) -> None:
    study = write_study(tmp_path, extra=EXTRA, windows=(8, 8, 16))
    command = [sys.executable, "-m", "tests.search.run.killed_preparations", str(study), str(tmp_path), probe]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    written, processes = map(int, ran.stdout.split())
    assert processes == written >= 4  # each got one step further: fingerprint, baseline, both ends, probes
    for name in (FINGERPRINT, BASELINE, GRADIENTS, PROBES):
        whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
        assert whole.exists() == killed.exists()
        if whole.exists():
            assert _sorted(killed) == _sorted(whole), name


def _sorted(path: Path) -> list[str]:
    """The lines, whatever their order: groups of probes may be gone on with in another."""
    return sorted(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("probe", ["none", "gradient", "measured"])
def test_a_prepared_study_is_read_and_nothing_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str
) -> None:
    spec = load_spec(write_study(tmp_path, extra=EXTRA), [f"search.probe={probe}"])
    run = RunDirectory(tmp_path / "run")
    first = prepare.prepare(spec, run, _quiet)
    for module, name in ((ends, "measure_baseline"), (ends, "open_end"), (gradients, "layer_by_layer")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured again"))
    again = prepare.prepare(spec, run, _quiet)
    assert again.probes == first.probes
    assert again.baseline.evaluation.nll.tolist() == first.baseline.evaluation.nll.tolist()


def test_a_baseline_of_before_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(write_study(tmp_path), ["search.probe=none"])
    run = RunDirectory(tmp_path / "run")
    prepare.prepare(spec, run, _quiet)
    stored = json.loads((run / BASELINE).read_text())
    assert stored["ends"].keys() == {"widest", "lowest"}
    del stored["ends"]["lowest"]
    run.write_json(BASELINE, stored)
    monkeypatch.setattr(ends, "measure_baseline", lambda *_: pytest.fail("measured again"))
    prepare.prepare(spec, run, _quiet)
    assert run.read_json(BASELINE)["ends"].keys() == {"widest", "lowest"}


def _quiet(line: str) -> None:
    """Says nothing."""
