"""The hybrid reference, searched for each runtime: its file is what was searched, and its runtime says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search.cli.main import app
from ssm_mp.runtimes.registry import FORMATS, get_format

STUDY = str(Path(__file__).parents[1] / "studies/hybrid-runtime.toml")
QUICK = ("data.search_windows=16", "data.certify_windows=48", "search.probe=gradient", "search.seeds=4")
NOT_QUITE = {"gguf": 1e-2, "mlx": 1e-4, "compressed-tensors": 1e-4, "onnx": 1e-4}
"""How far perplexities may be apart, relative: inputs that llama.cpp rounds to 8 bits tip over at the last bit."""


@pytest.mark.slow
@pytest.mark.parametrize("target", FORMATS)
def test_the_hybrid_is_searched_for_its_runtime_which_says_what_we_say(target: str, tmp_path: Path) -> None:
    run, sets = tmp_path / "run", [part for one in QUICK for part in ("--set", one)]
    done = CliRunner().invoke(
        app,
        ["search", STUDY, "--target", target, "--trials", "6", "--run-dir", str(run), *sets],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    front = json.loads((run / "front.json").read_text())
    gates = {gate["name"]: gate["verdict"] for gate in front["gates"]}
    assert gates[target] == "pass"
    suffix = get_format(target).suffix
    file = run / (f"winner{suffix}" if suffix else f"winner-{target}")
    told = json.loads((run / f"winner{suffix}.metrics.json" if suffix else file / "metrics.json").read_text())
    winner = next(point for point in front["front"] if point["trial"] == front["winner"])
    assert told["bytes"] == winner["bytes"] == get_format(target).tensor_bytes(file)
    assert winner["compression"] > 2
    verdict = told["verdict"]
    assert verdict["perplexity"] == pytest.approx(verdict["perplexity_here"], rel=NOT_QUITE[target])
    assert verdict["perplexity"] < 60  # it has learnt Python; guessing would be 8000
    assert target in (run / "report.md").read_text()
