"""A whole search in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search.problem.run_directory import REPORT, WINNER, RunDirectory
from search.problem.spec import load_spec
from search.run.one_process import run_search
from ssm_mp.artifact import read_artifact
from tests.ssm_mp.precisions.outside import register
from tests.tiny import CONFIGS, write_study

ONE = ("fp16", "fp8")
MANY = ("fp16", "bf16", "int8", "fp8", "offset6", "book5", "nf4", "book2")


@pytest.mark.parametrize(
    ("choices", "probe", "config"),
    [
        (ONE, "none", "mamba"),
        pytest.param(ONE, "measured", "mamba", marks=pytest.mark.slow),
        pytest.param(MANY, "gradient", "itera", marks=pytest.mark.slow),
    ],
    ids=["one", "probed", "many"],
)
def test_a_precision_that_is_one_line_of_the_registry_is_searched_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[str, ...], probe: str, config: str
) -> None:
    register(monkeypatch)
    overrides = [f"precision.choices={json.dumps(choices[::-1])}", f'search.probe="{probe}"']
    overrides += ["search.trials=4", "search.budget_percent=1000"]
    spec = load_spec(write_study(tmp_path, config=CONFIGS[config]), overrides)
    assert spec.precision.choices == choices
    run = RunDirectory(tmp_path / "run")
    run_search(spec, run, lambda line: None)
    winner = read_artifact(run / WINNER)
    used = {precision for _, precision in winner.precision_map}
    assert used - {"fp16"} <= set(choices)
    assert len(used) > 1
    assert all(name in (run / REPORT).read_text() for name in choices)


@pytest.mark.slow
def test_latencies_are_measured_of_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    overrides = ['precision.choices=["fp16","fp8"]', 'search.objectives=["compression","perplexity","latency"]']
    overrides += ["search.trials=4", "search.budget_percent=1000"]
    run = RunDirectory(tmp_path / "run")
    run_search(load_spec(write_study(tmp_path), overrides), run, lambda line: None)
    assert "fp8" in (run / REPORT).read_text()
