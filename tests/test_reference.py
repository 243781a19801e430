"""The reference study end to end, with few trials and windows: what `make search` does, read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.search.cli.test_main import answer

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "studies" / "reference.toml"
CHECKPOINT = ROOT / "studies" / "reference" / "model.safetensors"


def test_the_reference_checkpoint_is_good_enough() -> None:
    training = json.loads((ROOT / "studies" / "reference" / "training.json").read_text())
    assert training["perplexity"]["certify"] <= 22
    assert training["checkpoint_sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_reference_checkpoint_predicts_the_library_of_this_interpreter(tmp_path: Path) -> None:
    found = answer("evaluate", CHECKPOINT, "--study", STUDY, "--split", "certify", cwd=tmp_path)
    assert found["windows"] == 512
    assert 10 < found["perplexity"] < 40  # other Pythons have other libraries


@pytest.mark.slow
def test_the_reference_study_ends_in_a_certified_artifact(tmp_path: Path) -> None:
    few = ("--set", "data.search_windows=16", "--set", "data.certify_windows=32", "--set", "data.calibration_windows=8")
    found = answer("search", STUDY, "--trials", 8, "--run-dir", "run", *few, cwd=tmp_path)
    assert found["trials"] == 8
    assert found["certificate"]["verdict"] == "certified"
    assert found["certificate"]["upper_percent"] < 5
    winner = next(point for point in found["front"] if point["trial"] == found["winner"])
    assert winner["compression"] > 3.5
    exported = answer("export", STUDY, "--out", "out", "--run-dir", "run", *few, cwd=tmp_path)
    assert exported["map"] == winner["map"]
    assert exported["perplexity"] == winner["perplexity"]
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(a.numel() * a.element_size() for a in arrays.values()) == winner["bytes"]
    assert 0 < exported["file_bytes"] - winner["bytes"] < 20_000
