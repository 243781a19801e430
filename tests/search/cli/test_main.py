"""The command line on a tiny model: answers, exit codes, and mistakes without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_mp import evaluate, load_artifact
from ssm_mp.evaluation.latency import table_from_json
from tests.cluster.gate import Gate
from tests.cluster.processes import HUNG, wait_until
from tests.cluster.studying import running
from tests.tiny import ITERA, write_study

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "search.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def ssm_mp(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def answer(*arguments: object, cwd: Path, code: int = 0) -> Any:
    done = ssm_mp(*arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object, cwd: Path, code: int = 2) -> str:
    """The error of a command that fails as it should: one line that begins with `error:`, no traceback."""
    done = ssm_mp(*arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny study that was searched."""
    folder = tmp_path_factory.mktemp("searched")
    write_study(folder, windows=(4, 32, 32), extra="[search]\nbudget_percent = 8\nseeds = 4\n")
    (folder / "answer.json").write_text(json.dumps(answer("search", "tiny.toml", "--trials", 10, cwd=folder)))
    return folder


@pytest.mark.slow
def test_the_whole_line_writes_what_it_says(searched: Path) -> None:
    found = json.loads((searched / "answer.json").read_text())
    run = searched / "runs" / "tiny"
    assert found["trials"] == 10
    assert found["certificate"]["verdict"] == "certified"
    assert found["winner"] in {p["trial"] for p in found["front"]}
    for name in ("front", "sensitivities", "allocation"):
        assert (run / f"{name}.png").stat().st_size > 10_000
        assert (run / f"{name}.svg").exists()
    report = (run / "report.md").read_text()
    for part in ("## Front", "## Certificate", "## Winner", "## Components", "## Provenance", "layers.1.ssm.A_log"):
        assert part in report
    metrics = json.loads((run / "winner" / "metrics.json").read_text())
    winner = next(p for p in found["front"] if p["trial"] == found["winner"])
    assert metrics["perplexity"] == winner["perplexity"]
    assert metrics["bytes"] == winner["bytes"]
    held = json.loads((run / "winner" / "precision_map.json").read_text())
    assert held["map"] == winner["map"]
    assert "layers.0.ssm.A_log" in held["pins"]


@pytest.mark.slow
def test_front_status_and_plot_answer_from_the_run_directory(searched: Path) -> None:
    found = json.loads((searched / "answer.json").read_text())
    again = answer("front", "tiny.toml", "--set", "search.budget_percent=8", cwd=searched)
    assert again["front"] == found["front"]
    assert again["winner"] == found["winner"]
    assert again["baseline"].keys() == {"perplexity", "bytes"}
    standing = answer("status", "tiny.toml", "--set", "search.budget_percent=8", cwd=searched)
    assert (standing["finished"], standing["asked"], standing["running"], standing["failed"]) == (10, 10, [], 0)
    assert standing["best"] == found["front"][0]
    picture = searched / "runs" / "tiny" / "front.png"
    picture.unlink()
    answer("plot", "tiny.toml", cwd=searched)
    assert picture.exists()


@pytest.mark.slow
def test_probes_answer_in_percent_from_both_ends(searched: Path) -> None:
    probes = answer("probe", "tiny.toml", cwd=searched)["probes"]
    assert {p["from"] for p in probes} == {"fp16", "int8"}
    assert all(
        {"component", "precision", "from", "increase_percent", "stderr_percent", "kl"} <= p.keys() for p in probes
    )


@pytest.mark.slow
def test_a_search_with_latency_reports_its_predictions_and_exports_the_fastest(tmp_path: Path) -> None:
    study = '[search]\nbudget_percent = 8\nseeds = 4\nobjectives = ["compression", "perplexity", "latency"]\n'
    write_study(tmp_path, windows=(4, 32, 32), extra=study)
    found = answer("search", "tiny.toml", "--trials", 12, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny"
    table = json.loads((run / "latency.json").read_text())
    assert found["latency"]["prediction_error"]["worst"] == table["error"]["worst"]
    predict = table_from_json({name: value for name, value in table.items() if name != "fingerprint"}).predict
    assert all(p["latency_seconds"] == predict(p["map"]) for p in found["front"])
    report = (run / "report.md").read_text()
    for part in ("## Latency", "latency ms", "rank correlation", "Predicted latency", "With latency"):
        assert part in report
    metrics = json.loads((run / "winner" / "metrics.json").read_text())
    winner = next(p for p in found["front"] if p["trial"] == found["winner"])
    assert metrics["latency"]["predicted_seconds"] == winner["latency_seconds"]
    assert metrics["latency"]["prediction_error"]["median"] == table["error"]["median"]
    again = answer("front", "tiny.toml", cwd=tmp_path)
    assert (again["front"], again["latency"]) == (found["front"], found["latency"])
    chosen = answer("export", "tiny.toml", "--out", "fast", "--pick", "fastest", cwd=tmp_path)
    fastest = min(found["front"], key=lambda p: (p["latency_seconds"], p["bytes"]))
    assert (chosen["map"], chosen["latency_seconds"]) == (fastest["map"], fastest["latency_seconds"])
    more = answer("search", "tiny.toml", "--trials", 14, cwd=tmp_path)  # on the same table
    assert (more["trials"], more["latency"]) == (14, found["latency"])


@pytest.mark.slow
def test_a_study_without_latency_knows_no_fastest(searched: Path, tmp_path: Path) -> None:
    said = refused("export", "tiny.toml", "--out", tmp_path / "a", "--pick", "fastest", cwd=searched)
    assert "knows no latencies" in said
    assert "[search] objectives" in said
    metrics = json.loads((searched / "runs" / "tiny" / "winner" / "metrics.json").read_text())
    assert "latency" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("pick", ["smallest", "knee", "0"])
def test_an_export_is_verified_and_evaluates_to_what_it_says(searched: Path, tmp_path: Path, pick: str) -> None:
    out = tmp_path / "artifact"
    found = answer("export", "tiny.toml", "--out", out, "--pick", pick, cwd=searched)
    assert found["verified"] is True
    assert found["path"] == str(out)
    assert (out / "allocation.png").exists()
    assert (out / "model.safetensors").stat().st_size == found["file_bytes"]
    evaluated = answer("evaluate", out, "--study", "tiny.toml", cwd=searched)
    assert evaluated["perplexity"] == found["perplexity"]
    assert evaluated["windows"] == 32
    assert "already exists" in refused("export", "tiny.toml", "--out", out, cwd=searched)
    answer("export", "tiny.toml", "--out", out, "--force", cwd=searched)


@pytest.mark.slow
def test_a_larger_number_of_trials_adds_to_what_is_there(searched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched, folder)
    before = {p["trial"]: p for p in json.loads((folder / "answer.json").read_text())["front"]}
    lines = (folder / "runs" / "tiny" / "probes.jsonl").read_text()
    found = answer("search", "tiny.toml", "--trials", 14, cwd=folder)
    assert found["trials"] == 14
    assert (folder / "runs" / "tiny" / "probes.jsonl").read_text() == lines
    kept = {p["trial"]: p for p in found["front"] if p["trial"] in before}
    assert all(kept[trial] == before[trial] for trial in kept)


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_search_continues(tmp_path: Path, sig: signal.Signals) -> None:
    write_study(tmp_path, windows=(4, 32, 32), extra="[search]\nseeds = 2\nbudget_percent = 8\n")
    gate, log = Gate.at(tmp_path / "gate"), tmp_path / "search.log"
    gate.admit(4)
    arguments = ("search", "tiny.toml", "--trials", 40)
    with running(*arguments, cwd=tmp_path, log=log, environment=gate.environment) as process:
        wait_until(lambda: gate.admitted() == 4, log.read_text)
        gate.wait_for(1, log.read_text)
        process.send_signal(sig)
        process.wait(HUNG)
    if sig is signal.SIGINT:
        assert process.returncode == 130
        assert "continues where it stopped" in log.read_text()
        assert "Traceback" not in log.read_text()
    assert answer("status", "tiny.toml", cwd=tmp_path)["finished"] == 4
    found = answer("search", "tiny.toml", "--trials", 7, cwd=tmp_path)
    assert found["trials"] == 7
    after = answer("status", "tiny.toml", cwd=tmp_path)
    assert (after["finished"], after["running"]) == (7, [])


@pytest.mark.slow
def test_a_search_of_experts_ends_in_an_artifact(tmp_path: Path) -> None:
    extra = '[precision]\nunpin = ["router", "B", "C"]\n[search]\nbudget_percent = 20\nseeds = 3\ntrials = 8\n'
    write_study(tmp_path, config=ITERA, windows=(8, 32, 64), extra=extra)
    found = answer("search", "tiny.toml", cwd=tmp_path)
    assert found["certificate"]["verdict"] == "certified"
    winner = next(point for point in found["front"] if point["trial"] == found["winner"])
    assert winner["map"]["layers.1.moe.layer.router.gate"] in ("fp16", "int8")
    evaluated = answer("evaluate", "runs/tiny/winner", "--study", "tiny.toml", cwd=tmp_path)
    assert evaluated["perplexity"] == winner["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["measured", "gradient", "none"])
def test_a_search_below_8_bits_with_embedding_blocks_ends_in_an_artifact(tmp_path: Path, probe: str) -> None:
    precision = '[precision]\nchoices = ["fp16", "int8", "nf4", "int3"]\nembedding_blocks = [8, 24]\n'
    options = f'[search]\nbudget_percent = 20\nseeds = 2\nprobe = "{probe}"\n'
    write_study(tmp_path, windows=(4, 32, 32), extra=precision + options)
    found = answer("search", "tiny.toml", "--trials", 14, cwd=tmp_path)
    assert found["trials"] == 14
    assert {"embedding.blocks.0", "embedding.blocks.1", "embedding.blocks.2"} <= found["front"][0]["map"].keys()
    assert all(point["windows"] == 32 for point in found["front"])
    exported = answer("export", "tiny.toml", "--out", "out", "--set", "search.budget_percent=20", cwd=tmp_path)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == exported["bytes"]
    assert torch.float32 not in {tensor.dtype for tensor in stored.values()}
    report = (tmp_path / "runs" / "tiny" / "report.md").read_text()
    assert ("sensitivities.png" in report) == (probe != "none") == (tmp_path / "runs/tiny/sensitivities.png").exists()
    answer("plot", "tiny.toml", cwd=tmp_path)


def test_inspect_and_convert_answer_with_their_keys(tmp_path: Path) -> None:
    write_study(tmp_path, config=ITERA)
    found = answer("inspect", "model.safetensors", cwd=tmp_path)
    assert (found["family"], found["layout"]) == ("itera", "canonical")
    assert found["fp32_bytes"] == 4 * found["parameters"] == 4 * sum(c["parameters"] for c in found["components"])
    assert {"name", "kind", "layer", "parameters", "share", "pinned"} == found["components"][0].keys()
    (tmp_path / "map.toml").write_text('"*" = "fp16"\n"layers.*.in_proj" = "int8"\n')
    study = write_study(tmp_path, config=ITERA, windows=(4, 32, 32))
    for chosen in ("aggressive", "map.toml"):
        out = tmp_path / f"out-{chosen}"
        done = answer("convert", "model.safetensors", "--map", chosen, "--study", study, "--out", out, cwd=tmp_path)
        assert {"compression", "bytes", "file_bytes", "perplexity", "increase_percent"} <= done.keys()
        assert done["compression"] == pytest.approx(found["fp32_bytes"] / done["bytes"])
        assert load_artifact(out)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 64)


def test_mistakes_end_with_code_2_and_one_clear_error(tmp_path: Path) -> None:
    write_study(tmp_path)
    assert "no checkpoint at" in refused("inspect", "absent.pt", cwd=tmp_path)
    assert "no study file" in refused("search", "absent.toml", cwd=tmp_path)
    assert "the nearest is 'trials'" in refused("search", "tiny.toml", "--set", "search.trails=3", cwd=tmp_path)
    assert "no search has been run" in refused("front", "tiny.toml", cwd=tmp_path)
    assert "no search has been run" in refused("export", "tiny.toml", "--out", "x", cwd=tmp_path)
    asked = refused("search", "tiny.toml", "--set", "data.search_windows=500", cwd=tmp_path)
    assert "are asked for" in asked
    (tmp_path / "map.toml").write_text('"*" = "fp16"\n"layers.*.A_log" = "int8"\n')
    convert = ("convert", "model.safetensors", "--study", "tiny.toml", "--out", "x", "--map")
    assert "cannot be lifted" in refused(*convert, "map.toml", cwd=tmp_path)
    assert "or an existing map file" in refused(*convert, "absent.toml", cwd=tmp_path)
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 64, size=1000))
    noise = refused("search", "tiny.toml", "--set", "data.text=noise.npy", cwd=tmp_path)
    assert "no better than guessing uniformly" in noise
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("checkpoint", "another checkpoint"),
        ("data.seed=5", "another search windows"),
        ("precision.activations=none", "another scheme"),
        ('precision.pin=["embedding"]', "another space"),
    ],
)
def test_resuming_with_something_else_is_refused(searched: Path, tmp_path: Path, change: str, what: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched, folder)
    arguments = ["search", "tiny.toml"]
    if change == "checkpoint":
        tensors = load_file(folder / "model.safetensors")
        tensors["norm.bias"][0] += 0.5
        save_file(tensors, folder / "model.safetensors")
    else:
        arguments += ["--set", change]
    assert what in refused(*arguments, cwd=folder)


@pytest.mark.slow
def test_one_more_precision_continues_a_search_with_its_trials_and_its_certificate(
    searched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched, folder)
    before, run = json.loads((folder / "answer.json").read_text()), folder / "runs" / "tiny"
    tries = (run / "tries.jsonl").read_text()
    more = ["--set", 'precision.choices=["fp16", "int8", "nf4", "int4", "int3"]']
    done = ssm_mp("search", "tiny.toml", "--trials", 12, *more, "--json", cwd=folder)
    assert "10 finished trials, which count as trials of this study" in done.stderr
    after = json.loads(done.stdout)
    assert after["trials"] >= 12
    assert (run / "tries.jsonl").read_text().startswith(tries)
    found = answer("front", "tiny.toml", *more, cwd=folder)
    shared = {point["trial"]: point for point in found["front"]}
    for point in before["front"]:
        if point["trial"] in shared:
            assert shared[point["trial"]] == point
    assert len(answer("plot", "tiny.toml", *more, cwd=folder)) > 4
    assert "another space" in refused("search", "tiny.toml", cwd=folder)


@pytest.mark.slow
def test_an_inconclusive_certificate_is_answered_with_no_and_can_be_repeated(tmp_path: Path) -> None:
    write_study(tmp_path, windows=(4, 8, 2), extra="[search]\nconfidence = 0.99999999\nseeds = 0\ntrials = 3\n")
    found = answer("search", "tiny.toml", cwd=tmp_path, code=1)
    assert found["winner"] is None
    assert found["certificate"]["verdict"] == "inconclusive"
    assert not (tmp_path / "runs" / "tiny" / "winner").exists()
    assert (tmp_path / "runs" / "tiny" / "report.md").exists()
    assert "More windows are needed" in (tmp_path / "runs" / "tiny" / "report.md").read_text()
    assert "certified" in refused("export", "tiny.toml", "--out", "x", cwd=tmp_path, code=1)
    again = answer("search", "tiny.toml", "--set", "data.certify_windows=100", cwd=tmp_path)
    assert (again["trials"], again["certificate"]["verdict"]) == (3, "certified")
    assert (tmp_path / "runs" / "tiny" / "winner").exists()


def _mounted(folder: Path) -> bool:
    """A file system of 600 KB at `folder`, where this machine lets us make one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, check=False
    )
    return done.returncode == 0


def test_a_full_disk_during_export_leaves_nothing_behind(tmp_path: Path) -> None:
    small = tmp_path / "small"
    if not _mounted(small):
        pytest.skip("mounting a small file system needs root")
    try:
        (small / "filler").write_bytes(b"x" * 560_000)
        write_study(tmp_path, windows=(4, 32, 32))
        errors = refused(
            "convert",
            "model.safetensors",
            "--map",
            "aggressive",
            "--study",
            "tiny.toml",
            "--out",
            small / "out",
            cwd=tmp_path,
        )
        assert "could not be written" in errors
        assert os.listdir(small) == ["filler"]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_an_artifact_evaluates_as_its_metrics_say(tmp_path: Path) -> None:
    study = write_study(tmp_path, windows=(4, 32, 32))
    answer("convert", "model.safetensors", "--map", "conservative", "--study", study, "--out", "out", cwd=tmp_path)
    from search.problem.spec import load_spec
    from search.problem.splits import load_splits

    model = load_artifact(tmp_path / "out")
    found = evaluate(model, load_splits(load_spec(study), model.config).search)
    assert found.perplexity == json.loads((tmp_path / "out" / "metrics.json").read_text())["perplexity"]
