"""What goes wrong with files for other runtimes: one line and an exit code for each, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from search.cli import main
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.registry import get_format
from tests.tiny import MAMBA, VOCABULARY, write_study

EVEN = MambaConfig(vocabulary=VOCABULARY, d_model=32, d_inner=64, d_state=16, dt_rank=32, d_conv=4, n_layers=1)
"""Rows that blocks of 32 divide, and twice as wide inside, as llama.cpp has it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of a model that every format but ONNX's refuses, `odd`, and of one for llama.cpp, `even`,
    and an artifact of each."""
    folder = tmp_path_factory.mktemp("made")
    for name, config, rule in (("odd", MAMBA, "fp16"), ("even", EVEN, "nf4")):
        (folder / name).mkdir()
        study = write_study(folder / name, config=config)
        rules = folder / name / "map.json"
        rules.write_text(json.dumps({"*": "fp16", "*.out_proj": rule}))
        asked = ["convert", folder / name, "--map", rules, "--study", study, "--out", folder / f"{name}-artifact"]
        done = CliRunner().invoke(main.app, [*map(str, asked)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return folder


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what is said of a command that fails."""
    found = CliRunner().invoke(main.app, [*map(str, arguments)])
    assert isinstance(found.exception, Exception), found.output
    code = main._explained(found.exception)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return code, said


def transferred(made: Path, out: Path, *further: object, format_: str = "gguf", name: str = "even") -> list[object]:
    study = made / name / "tiny.toml"
    return ["transfer", made / f"{name}-artifact", "--format", format_, "--out", out, "--study", study, *further]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_what_a_format_does_not_hold_is_named_and_written_wider_only_when_asked(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    code, said = failed(capsys, *transferred(made, out))
    assert code == 2
    assert "gguf cannot hold layers.0.ssm.out_proj at nf4; --widen stores" in said
    assert left(tmp_path) == []
    done = CliRunner().invoke(main.app, [*map(str, transferred(made, out, "--widen", "--json"))])
    told: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == 0
    assert told["widened"] == "layers.0.ssm.out_proj: nf4 as int8"
    assert told["verified"] is True


@pytest.mark.parametrize("format_", ["gguf", "mlx", "compressed-tensors"])
def test_a_model_that_a_format_does_not_know(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    out = tmp_path / f"x{get_format(format_).suffix}"
    code, said = failed(capsys, *transferred(made, out, format_=format_, name="odd"))
    assert code == 2
    assert said.startswith(f"error: {format_}: ")
    assert left(tmp_path) == []


def test_what_is_not_an_artifact_of_this_version(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    for path, expected in ((made / "even", "not an artifact folder"), (tmp_path / "none", "not an artifact folder")):
        code, said = failed(capsys, "transfer", path, "--format", "gguf", "--out", out)
        assert (code, expected in said) == (2, True)
    shutil.copytree(made / "even-artifact", tmp_path / "later")
    said_map = tmp_path / "later" / "precision_map.json"
    said_map.write_text(said_map.read_text().replace("ssm-mp/1", "ssm-mp/2"))
    code, said = failed(capsys, "transfer", tmp_path / "later", "--format", "gguf", "--out", out)
    assert code == 2
    assert "format 'ssm-mp/2', this version reads 'ssm-mp/1'" in said
    assert not out.exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_exists(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], force: bool) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    code, said = failed(capsys, *transferred(made, out, *(["--force"] if force else []), format_="mlx"))
    assert code == 2
    assert ("was not written by this tool" if force else "already exists; replace it with --force") in said
    assert left(tmp_path) == ["mine"]


def test_a_full_disk(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Format, item: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(get_format("gguf")), "write", full)
    code, said = failed(capsys, *transferred(made, tmp_path / "new" / "x.gguf", "--widen"))
    assert code == 2
    assert "could not be written" in said
    assert left(tmp_path) == []


def test_a_runtime_that_dies(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = [sys.executable, "-c", "import os; os.abort()"]
    monkeypatch.setattr(type(get_format("gguf")), "ask", lambda *_: dying)
    found = CliRunner().invoke(main.app, [*map(str, transferred(made, tmp_path / "x.gguf", "--widen"))])
    assert isinstance(found.exception, Exception)
    assert main._explained(found.exception) == 1
    said = capsys.readouterr().err
    assert "died of SIGABRT" in said
    assert "Traceback" not in said
    assert left(tmp_path) == []


def test_a_runtime_or_a_writer_that_is_missing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_format("gguf")), "modules", ("no_such_runtime",))
    out = tmp_path / "x.gguf"
    done = CliRunner().invoke(main.app, [*map(str, transferred(made, out, "--widen", "--json"))])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["verified"] is False
    assert "lacks no_such_runtime; pip install" in json.loads(done.stdout)["verdict"]
    monkeypatch.setattr(type(get_format("gguf")), "writer", ("no_such_writer",))
    code, said = failed(capsys, *transferred(made, tmp_path / "y.gguf", "--widen"))
    assert code == 3
    assert "gguf needs no_such_writer" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("transfer", "even-artifact", "--format", "ggml", "--out", "x"), "unknown format 'ggml'; known are 'gguf'"),
        (("transfer", "even-artifact", "--format", "gguf", "--out", "x.bin"), "expected a name that ends with .gguf"),
        (("export", "even/tiny.toml", "--format", "ggml", "--out", "x"), "unknown format 'ggml'"),
        (("export", "even/tiny.toml", "--format", "gguf", "--out", "x.gguf"), "no search has been run here yet"),
        (("search", "even/tiny.toml", "--target", "ggml"), "unknown format 'ggml'"),
        (("search", "odd/tiny.toml", "--target", "mlx"), "[export] target = 'mlx': "),
        (("formats", "none"), "the file or folder does not exist"),
        (("formats", "even-artifact"), "already converted"),
    ],
)
def test_mistakes_on_the_command_line(
    made: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(made)
    before = left(made)
    code, said = failed(capsys, *arguments)
    assert code == 2
    assert expected in said
    assert [name for name in left(made) if name.startswith("x")] == [name for name in before if name.startswith("x")]
