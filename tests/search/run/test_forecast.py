"""What a dry run says: counts are exact, times add up, nothing is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.run.forecast import forecast
from search.run.one_process import run_search
from tests.tiny import write_study


def silent(line: str) -> None:
    pass


def test_a_forecast_counts_what_a_search_would_measure(tmp_path: Path) -> None:
    spec = load_spec(write_study(tmp_path), ["precision.choices=['fp16','int8','nf4']"])
    found = forecast(spec, RunDirectory(tmp_path / "run"), silent)
    free = found.components - found.pinned
    assert found.moves == free > 0
    assert found.log10_maps == pytest.approx(free * math.log10(3))
    assert found.maps == (3**free if 3**free < 1_000_000 else None)
    assert (found.probes, found.trials, found.asked) == (4 * free, 64, 64)
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in found.seconds.values())
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert json.loads(json.dumps(found.to_json()))["total_seconds"] == found.total
    assert not (tmp_path / "run").exists()


def test_groups_and_other_probes_are_counted_as_such(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    auto = ["search.probe=gradient", "precision.group=auto", "precision.max_groups=3"]
    found = forecast(load_spec(study, auto), RunDirectory(tmp_path / "run"), silent)
    assert (found.moves, found.maps, found.probes) == (3, 8, 0)
    assert found.seconds["probes"] == pytest.approx(21 * found.evaluation_seconds)
    by_layer = forecast(load_spec(study, ["precision.group=layer"]), RunDirectory(tmp_path / "run"), silent)
    assert by_layer.moves < by_layer.components - by_layer.pinned


@pytest.mark.slow
def test_what_a_run_has_made_already_is_not_asked_for_again(tmp_path: Path) -> None:
    spec = load_spec(write_study(tmp_path), ["search.trials=6", "search.budget_percent=50"])
    run = RunDirectory(tmp_path / "run")
    run_search(spec, run, silent)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    more = load_spec(spec.path, ["search.trials=8", "search.budget_percent=50"])
    found = forecast(more, run, silent)
    assert (found.trials, found.asked, found.probes) == (2, 8, 0)
    assert "the mean of the 6 that are finished" in found.basis
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    with pytest.raises(StudyError, match="this study was begun with another search windows"):
        forecast(load_spec(spec.path, ["data.search_windows=9"]), run, silent)
