"""A search for the file of another runtime: what it may choose, what it measures, and what is written in the end."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from search.base.errors import StudyError
from search.base.front import Point
from search.cli.main import app
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.results.transferred import speaks_of
from search.run.finish import for_target
from ssm_mp.artifact import load_artifact, read_artifact
from ssm_mp.errors import MissingError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.exportable import Exportable, with_inputs
from ssm_mp.runtimes.format import Encoding
from ssm_mp.runtimes.registry import FORMATS, get_format
from ssm_mp.runtimes.transfer import Plan
from tests.tiny import VOCABULARY, write_study

EVEN = MambaConfig(vocabulary=VOCABULARY, d_model=32, d_inner=64, d_state=16, dt_rank=32, d_conv=4, n_layers=2)
"""Rows that blocks of 32 divide, and twice as wide inside, as llama.cpp has it."""
THREE = '[precision]\nchoices = ["fp16", "int8", "int4"]\n[search]\ntrials = 8\nseeds = 4\n'


def answered(*arguments: object) -> Any:
    found = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny study that was searched for gguf."""
    folder = tmp_path_factory.mktemp("searched")
    study = write_study(folder, config=EVEN, windows=(4, 24, 32), extra=THREE)
    run = CliRunner().invoke(
        app, ["search", str(study), "--target", "gguf", "--run-dir", str(folder / "run")], catch_exceptions=False
    )
    assert run.exit_code in (0, 1), run.output  # a tiny model may miss a gate of speed or size
    return folder


def workspace_of(folder: Path, target: str) -> Workspace:
    return open_workspace(load_spec(folder / "tiny.toml", [f"export.target={target}"]))


def test_every_size_of_the_search_is_the_files(searched: Path) -> None:
    front = json.loads((searched / "run/front.json").read_text())
    workspace, format_ = workspace_of(searched, "gguf"), get_format("gguf")
    assert front["winner"] is not None
    for point in front["front"]:
        precisions = workspace.space.map(point["map"]).to_json()
        held = [
            format_.encoding(component, precisions[component.name], EVEN) for component in workspace.space.components
        ]
        assert point["bytes"] == sum(one.bytes for one in held if one is not None)
    told = json.loads((searched / "run/winner.gguf.metrics.json").read_text())
    winner = next(point for point in front["front"] if point["trial"] == front["winner"])
    assert told["bytes"] == winner["bytes"]
    assert told["certificate_is_of_this_file"] is True
    assert told["verified"] is True


def test_the_artifact_beside_it_tells_its_own_size(searched: Path) -> None:
    told = json.loads((searched / "run/winner/metrics.json").read_text())
    artifact = read_artifact(searched / "run/winner")
    assert told["compression"] == told["fp32_bytes"] / artifact.tensor_bytes
    of_file = json.loads((searched / "run/winner.gguf.metrics.json").read_text())["bytes"]
    assert artifact.tensor_bytes != of_file


def test_front_and_plots_are_shown_of_the_target_that_is_named(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/tiny-gguf").symlink_to(searched / "run")
    assert answered("front", searched / "tiny.toml", "--target", "gguf")["winner"] is not None
    with pytest.raises(StudyError, match="no search has been run here yet; .*; there is one with --target gguf"):
        CliRunner().invoke(app, ["front", str(searched / "tiny.toml")], catch_exceptions=False)


def test_the_winners_file_passes_its_gate_and_stands_in_the_report(searched: Path) -> None:
    gates = {gate["name"]: gate for gate in json.loads((searched / "run/front.json").read_text())["gates"]}
    assert gates["gguf"]["verdict"] == "pass"
    assert re.match(r"verified by llama\.cpp \(xllamacpp .*\): weights equal, perplexity", gates["gguf"]["figures"])
    report = (searched / "run/report.md").read_text()
    assert "## For llama.cpp" in report
    assert "Q8_0" in report or "Q4_0" in report


def test_what_is_measured_is_the_runtimes_rounding_of_inputs(searched: Path) -> None:
    workspace = workspace_of(searched, "gguf")
    model = workspace.converter.convert(workspace.space.lowest())
    artifact = load_artifact(searched / "run/winner")
    assert evaluate(artifact, workspace.splits.search).perplexity > 0
    plain = open_workspace(load_spec(searched / "tiny.toml", ["precision.activations=none"]))
    other = plain.converter.convert(plain.space.map(workspace.space.lowest().to_json()))
    windows = workspace.splits.search
    assert evaluate(model, windows).perplexity != evaluate(other, windows).perplexity


def test_the_space_is_what_the_target_holds(searched: Path) -> None:
    for target in FORMATS:
        if get_format(target).refusal(EVEN) is not None:
            continue
        space = workspace_of(searched, target).space
        for component in space.components:
            sizes = [component.bytes(precision, "none") for precision in space.choices[component.name]]
            assert sizes == sorted(sizes, reverse=True), (target, component.name)
            assert len(set(sizes)) == len(sizes), (target, component.name)


def test_a_study_for_a_target_is_another_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, config=EVEN, extra=THREE)
    plain, aimed = load_spec(study), load_spec(study, ["export.target=gguf"])
    assert RunDirectory.of(plain).path.name == "tiny"
    assert RunDirectory.of(aimed).path.name == "tiny-gguf"
    assert open_workspace(aimed).fingerprint() != open_workspace(plain).fingerprint()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('[export]\ntarget = "ggml"\n', r"\[export\] target: unknown format 'ggml'; known are 'gguf'"),
        ('[precision]\nactivations = "static"\n[export]\ntarget = "gguf"\n', 'leave the key out, or say "blocks"'),
        ('[precision]\nactivations = "blocks"\n', r'are those of \[export\] target = "gguf"'),
        ('[precision]\nembedding_blocks = [8, 56]\n[export]\ntarget = "mlx"\n', "holds a table in blocks"),
    ],
)
def test_what_no_file_of_the_target_can_be_is_refused_when_the_study_is_read(
    tmp_path: Path, extra: str, message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        load_spec(write_study(tmp_path, config=EVEN, extra=extra))


def test_a_precision_that_the_target_never_holds_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    extra = '[precision]\nchoices = ["fp16", "nf4"]\n[export]\ntarget = "gguf"\n'
    spec, told = load_spec(write_study(tmp_path, config=EVEN, extra=extra)), list[str]()
    with pytest.raises(StudyError, match="holds no component of this model at nf4; take it out"):
        open_workspace(spec, told.append)
    assert not any("calibrating" in line for line in told)


def test_a_family_that_the_target_does_not_know_is_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path, extra='[export]\ntarget = "gguf"\n')  # LayerNorm and positions
    with pytest.raises(StudyError, match=r"\[export\] target = 'gguf': "):
        open_workspace(load_spec(study))


def test_a_tokenizer_that_the_target_has_no_way_for_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    study = write_study(tmp_path, config=EVEN, extra='[export]\ntarget = "gguf"\n')
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 4000)
    study.write_text(study.read_text().replace("tokens.npy", "text.txt"))
    told = list[str]()
    with pytest.raises(StudyError, match=r"'gguf': tokenizer\.json: expected a model of type 'BPE', found 'WordLevel'"):
        open_workspace(load_spec(study), told.append)
    assert not any("calibrating" in line for line in told)


def test_a_target_that_cannot_be_written_here_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_format("gguf")), "writer", ("no_such_writer",))
    study = write_study(tmp_path, config=EVEN, extra='[export]\ntarget = "gguf"\n')
    with pytest.raises(MissingError, match=r"gguf needs no_such_writer.* pip install .*\[gguf\]"):
        open_workspace(load_spec(study))


def test_a_file_of_a_former_winner_does_not_stay(searched: Path, tmp_path: Path) -> None:
    workspace = workspace_of(searched, "gguf")
    run = RunDirectory(tmp_path)
    for name in ("winner.gguf", "winner.gguf.metrics.json"):
        (tmp_path / name).write_bytes((searched / "run" / name).read_bytes())
    assert for_target(workspace, run, None, None, lambda line: None) == (None, None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "winner.gguf").write_text("mine")
    for_target(workspace, run, None, None, lambda line: None)
    assert (tmp_path / "winner.gguf").read_text() == "mine"


def test_a_file_that_fails_leaves_none_of_a_former_winner(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = json.loads((searched / "run/front.json").read_text())
    told = next(point for point in front["front"] if point["trial"] == front["winner"])
    winner = SimpleNamespace(trial=told["trial"], map=told["map"])
    for name in ("winner.gguf", "winner.gguf.metrics.json"):
        (tmp_path / name).write_bytes((searched / "run" / name).read_bytes())
    monkeypatch.setattr(type(get_format("gguf")), "ask", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    done, gate = for_target(
        workspace_of(searched, "gguf"), RunDirectory(tmp_path), cast("Point", winner), None, lambda line: None
    )
    assert done is None
    assert gate is not None
    assert gate.verdict == "fail"
    assert "failed with exit code 3" in gate.figures
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_was_for_no_runtime_is_exported_too_and_says_whose_certificate_it_has(tmp_path: Path) -> None:
    study, run = write_study(tmp_path, config=EVEN, windows=(4, 24, 32), extra=THREE), tmp_path / "run"
    assert CliRunner().invoke(app, ["search", str(study), "--run-dir", str(run)]).exit_code in (0, 1)
    out = tmp_path / "any.gguf"
    told = answered("export", study, "--run-dir", run, "--format", "gguf", "--out", out)
    assert told["verified"] is True
    assert told["certificate"] == "of another file"
    assert told["file_bytes"] == out.stat().st_size
    assert told["next"].startswith(("llama-cli -m", "python", "/"))


def test_an_artifact_is_transferred_with_windows_of_a_study(searched: Path, tmp_path: Path) -> None:
    artifact, study = searched / "run/winner", searched / "tiny.toml"
    told = answered("transfer", artifact, "--format", "gguf", "--out", tmp_path / "x.gguf", "--study", study)
    assert told["verified"] is True
    again = answered("transfer", artifact, "--format", "gguf", "--out", tmp_path / "y.gguf", "--no-verify")
    assert again["verified"] is False
    assert "--no-verify" in again["verdict"]
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    alone = answered("transfer", artifact, "--format", "gguf", "--out", tmp_path / "z.gguf")
    assert "the artifact has no tokenizer; --study names windows" in alone["verdict"]


def test_formats_are_listed_and_what_each_holds_of_a_checkpoint(searched: Path) -> None:
    assert [one["format"] for one in answered("formats")["formats"]] == list(FORMATS)
    held = {one["format"]: one for one in answered("formats", searched / "model.safetensors")["formats"]}
    rows = {row["kind"]: row["precisions"] for row in held["gguf"]["rows"]}
    assert rows["in_proj"]["int8"]["as"] == "Q8_0"
    assert rows["in_proj"]["nf4"] is None
    assert CliRunner().invoke(app, ["formats", str(searched / "model.safetensors")]).exit_code == 0


def test_the_arithmetic_of_a_file_is_that_of_its_artifact(searched: Path) -> None:
    """The artifact of a search for llama.cpp rounds inputs as that does; the model of its file alike."""
    workspace = workspace_of(searched, "gguf")
    artifact, windows = load_artifact(searched / "run/winner"), workspace.splits.search
    told = json.loads((searched / "run/winner.gguf.metrics.json").read_text())
    precision_map = PrecisionMap(tuple(told["map"].items()))
    rebuilt = with_inputs(Exportable("x", artifact, precision_map), "blocks")
    assert evaluate(rebuilt.model, windows).perplexity == evaluate(artifact, windows).perplexity


def test_a_certificate_is_of_a_file_for_its_target_in_which_no_value_is_another(searched: Path) -> None:
    workspace, gguf = workspace_of(searched, "gguf"), get_format("gguf")
    plan = Plan({"embedding": Encoding("Q8_0", 1)}, {})
    assert speaks_of(workspace, gguf, plan)
    assert not speaks_of(workspace, get_format("onnx"), plan)
    assert not speaks_of(workspace, gguf, replace(plan, widened={"embedding": ("nf4", "int8")}))
    assert not speaks_of(workspace, gguf, replace(plan, encodings={"embedding": Encoding("Q8_0", 1, "rounded anew")}))
