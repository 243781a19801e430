"""Standard output and error: any encoding, readers that leave, disks that are full, streams that are closed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.base.streams import READER_GONE, open_streams, readable
from search.cli import answers
from search.cli.options import print_answer
from tests.search.cli.test_main import COMMAND, ENVIRONMENT
from tests.tiny import write_study

ENCODINGS = ("ascii", "cp1252", "latin-1", "cp437", "koi8-r", "shift_jis", "gb18030", "cp037", "utf-8", "utf-16")

FRONT: dict[str, Any] = {
    "winner": 3, "trials": 9, "baseline": {"perplexity": 3.5, "bytes": 1000}, "budget_percent": 5.0,
    "front": [{"trial": 3, "origin": "front", "compression": 3.9, "bytes": 256, "perplexity": 3.6,
               "increase_percent": -0.25, "stderr_percent": 0.1}],
    "certificate": {"verdict": "certified", "increase_percent": -0.25, "windows": 64, "upper_percent": 1.0},
    "gates": [{"verdict": "pass", "name": "compression", "figures": "3.90× (≥ 1.5 passes) − fine … ±"}],
}  # fmt: skip
PROBES = {
    "probes": [{"component": "embedding", "from": "fp16", "precision": "int8", "increase_percent": 0.1,
                "stderr_percent": 0.05, "kl": None}]
}  # fmt: skip
TOLD: list[tuple[Callable[[Mapping[str, Any]], str], Mapping[str, Any]]] = [
    (answers.fronted, FRONT),
    (answers.probed, PROBES),
    (answers.listed, {"path": "modèle ×/字.pt", "perplexity": 3.5, "verified": True}),
]


def out_of(encoding: str, call: Callable[[], None]) -> str:
    """What is printed on a standard output of an encoding, decoded again."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    held = sys.stdout, sys.stderr
    try:
        sys.stdout = stream
        open_streams()
        call()
    finally:
        sys.stdout, sys.stderr = held
        stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("told", "content"), TOLD)
def test_every_answer_can_be_printed_in_every_encoding(
    encoding: str, told: Callable[[Mapping[str, Any]], str], content: Mapping[str, Any]
) -> None:
    printed = out_of(encoding, lambda: print_answer(content, False, told))
    assert readable(printed) == readable(told(content)) + "\n"


@given(text=st.text(st.characters(codec=None), min_size=1), encoding=st.sampled_from(ENCODINGS))
@example(text="3.90× ± −0.1 – …", encoding="ascii")
@example(text="\udcff\ud800", encoding="utf-8")
def test_any_text_is_printed_and_any_json_is_read_again(text: str, encoding: str) -> None:
    assert out_of(encoding, lambda: print_answer({"a": text}, False, lambda content: content["a"]))
    printed = out_of(encoding, lambda: print_answer({"a": text}, True, answers.listed))
    assert json.loads(printed).keys() == {"a"}
    if not any(0xD800 <= ord(sign) < 0xE000 for sign in text):
        assert json.loads(printed) == {"a": text}


def test_signs_are_readable_and_names_exact() -> None:
    assert readable("3.26× at −0.1 ± 0.2 % – “x” → y …") == '3.26x at -0.1 +/- 0.2 % - "x" -> y ...'
    assert readable("modèle") == "mod\\xe8le"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, for commands that need no torch."""
    folder = tmp_path_factory.mktemp("streams")
    write_study(folder, windows=(4, 32, 32))
    return folder


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `ssm-mp` is ours."""
    ours = f'ssm-mp() {{ {sys.executable} -m search.cli "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", ours + line], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True,
        encoding="utf-8", check=False,
    )  # fmt: skip


LEFT = "exec 9> >(true); wait $!"
"""Bash: descriptor 9 is a pipe whose reader has left."""


@pytest.mark.parametrize("command", ["launch tiny.toml --dry-run", "--help", "status --help"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_reader_that_leaves_is_no_failure_and_no_answer(folder: Path, command: str, encoding: str) -> None:
    line = f"{LEFT}; ssm-mp {command} >&9; echo $?"
    done = shell(line, folder, PYTHONIOENCODING=encoding)
    assert done.stdout.split() == [str(READER_GONE)]
    assert "Exception" not in done.stderr
    assert "Broken" not in done.stderr


def test_a_reader_of_standard_error_that_leaves_changes_nothing(folder: Path) -> None:
    line = f"{LEFT}; ssm-mp launch tiny.toml --dry-run 2>&9 >out; echo $?; ssm-mp front tiny.toml "
    assert shell(line + "2>&9; echo $?; ssm-mp frnt 2>&9; echo $?", folder).stdout.split() == ["0", "2", "2"]
    assert "#SBATCH" in (folder / "out").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("lost", [">/dev/full", ">&-", "</dev/null >&-"])
def test_an_answer_that_cannot_be_written_is_said_in_one_line(folder: Path, lost: str) -> None:
    done = shell(f"ssm-mp launch tiny.toml --dry-run {lost}", folder)
    assert done.returncode == 3
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert error.startswith("error: the answer cannot be written to standard output (")


@pytest.mark.slow
def test_a_closed_standard_error_gets_nothing_into_the_answer(folder: Path) -> None:
    asked = "ssm-mp launch tiny.toml --dry-run --set slurm.gres=gpu:1"
    assert "note: " in shell(asked, folder).stderr
    done = shell(f"{asked} 2>&-", folder)
    assert done.returncode == 0
    assert done.stdout.startswith("# runs/tiny/jobs/prepare.sbatch")
    assert "note: " not in done.stdout
    assert shell("ssm-mp front tiny.toml <&- >&- 2>&-", folder).returncode == 2
    assert shell("ssm-mp front tiny.toml 2>/dev/full", folder).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_search_ends_as_it_does_whatever_the_encoding(tmp_path: Path, encoding: str) -> None:
    write_study(tmp_path, windows=(4, 32, 32), extra="[search]\nbudget_percent = 8\nseeds = 4\ntrials = 6\n")
    done = subprocess.run(
        [*COMMAND, "search", "tiny.toml", "--workers", "2"], cwd=tmp_path, check=False, capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = done.stdout.decode(encoding)
    assert "passes, <" in table
    assert ("x (>= 1.5" if encoding == "ascii" else "× (>= 1.5") in table
    assert "×" in (tmp_path / "runs" / "tiny" / "report.md").read_text(encoding="utf-8")
    assert "Traceback" not in "".join(
        log.read_text(encoding=encoding) for log in (tmp_path / "runs" / "tiny" / "logs").iterdir()
    )


@pytest.mark.slow
def test_a_search_that_nobody_reads_is_complete_in_its_run_directory(tmp_path: Path) -> None:
    write_study(tmp_path, windows=(4, 32, 32), extra="[search]\nbudget_percent = 8\nseeds = 4\ntrials = 6\n")
    done = shell("set -o pipefail; ssm-mp search tiny.toml 2>&1 | true", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (READER_GONE, "", "")
    for name in ("report.md", "winner/model.safetensors", "front.png"):
        assert (tmp_path / "runs" / "tiny" / name).exists()
    again = shell("ssm-mp front tiny.toml --json", tmp_path)
    assert len(json.loads(again.stdout)["front"]) > 0
    assert os.listdir(tmp_path / "runs") == ["tiny"]
