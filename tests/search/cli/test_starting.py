"""`ssm-mp init`: a study from a checkpoint and a text, and the way from there to an exported file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from search.cli.main import app
from search.problem.spec import load_spec
from search.problem.splits import load_splits
from ssm_mp import load_artifact
from tests.search.cli.test_main import refused, ssm_mp
from tests.tiny import HUGGING_FACE, LENGTH, MAMBA, VOCABULARY, repetitive_tokens, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, its tokenizer and texts, in the current folder."""
    (tmp_path / "small").mkdir()
    write_checkpoint(tmp_path / "small" / "model.safetensors")
    words = [f"w{i}" for i in range(VOCABULARY)]
    (tmp_path / "small" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for number in range(20):
        text = " ".join(words[i] for i in repetitive_tokens(LENGTH * 10, seed=number))
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    np.save(tmp_path / "ids.npy", repetitive_tokens(LENGTH * 120))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["init", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def failed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["init", *arguments])
    assert done.exit_code != 0
    return str(done.exception)


def test_a_study_is_written_that_has_the_windows_it_says(folder: Path) -> None:
    found = begun("small/model.safetensors", "--text", "texts")
    assert (found["study"], found["family"], found["documents"]) == ("small.toml", "mamba", 20)
    assert found["next"] == "ssm-mp search small.toml"
    spec = load_spec(folder / "small.toml")
    splits = load_splits(spec, MAMBA)
    said = found["windows"]
    assert (len(splits.calibration), len(splits.search), len(splits.certify)) == tuple(said.values())
    assert list(said) == ["calibration", "search", "certify"]


def test_paths_are_seen_from_the_study(folder: Path) -> None:
    begun(
        "small/model.safetensors", "--text", "texts/0*.txt", "--text", str(folder / "texts/19.txt"), "--out", "a/b.toml"
    )
    spec = load_spec(folder / "a" / "b.toml")
    assert spec.checkpoint.path == "../small/model.safetensors"
    assert spec.data.texts == ("../texts/0*.txt", str(folder / "texts" / "19.txt"))
    load_splits(spec, MAMBA)


def test_token_ids_need_no_tokenizer(folder: Path) -> None:
    (folder / "small" / "vocab.txt").unlink()
    assert begun("small/model.safetensors", "--text", "ids.npy")["tokenizer"] is None
    load_splits(load_spec(folder / "small.toml"), MAMBA)


def test_a_text_without_a_tokenizer_is_one_error_and_no_file(folder: Path) -> None:
    (folder / "small" / "vocab.txt").unlink()
    error = refused("init", "small/model.safetensors", "--text", "texts", cwd=folder)
    assert "say which with --tokenizer" in error
    assert not (folder / "small.toml").exists()


def test_another_tokenizer_and_the_token_that_begins_texts_are_found(folder: Path) -> None:
    (folder / "t").mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)} | {"w0": 0}, unk_token="w0"))
    tokenizer.save(str(folder / "t" / "tokenizer.json"))
    content = json.dumps({"add_bos_token": True, "bos_token": "w1"})
    (folder / "t" / "tokenizer_config.json").write_text(content, encoding="utf-8")
    text = "\n".join(json.dumps({"body": f"w{i}"}) for i in repetitive_tokens(2000))
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    begun("small/model.safetensors", "--text", "a.jsonl", "--text-field", "body", "--tokenizer", "t/tokenizer.json")
    spec = load_spec(folder / "small.toml")
    assert (spec.data.bos, spec.data.tokenizer, spec.data.text_field) == (True, "t/tokenizer.json", "body")
    assert load_splits(spec, MAMBA).bos == 1


def test_a_study_that_is_there_is_kept_unless_it_is_forced(folder: Path) -> None:
    (folder / "small.toml").write_text("mine", encoding="utf-8")
    assert "small.toml exists already; --force replaces it" in failed("small/model.safetensors", "--text", "ids.npy")
    assert (folder / "small.toml").read_text(encoding="utf-8") == "mine"
    begun("small/model.safetensors", "--text", "ids.npy", "--force")
    load_spec(folder / "small.toml")


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ("absent", "ids.npy", "absent"),
        ("small/model.safetensors", "absent.txt", "no text or token file at"),
        ("small/model.safetensors", "short.npy", "different windows of 16 tokens, and a study takes 24"),
    ],
)
def test_what_cannot_be_read_leaves_no_file(folder: Path, model: str, text: str, message: str) -> None:
    np.save(folder / "short.npy", repetitive_tokens(LENGTH * 5))
    assert message in failed(model, "--text", text, "--out", "new/a.toml")
    assert not (folder / "new").exists()


def test_a_folder_gives_the_study_its_name(folder: Path) -> None:
    (folder / "Granite-4").mkdir()
    write_checkpoint(folder / "Granite-4" / "model.safetensors", HUGGING_FACE)
    write_checkpoint(folder / "my.safetensors", HUGGING_FACE)
    np.save("ids.npy", repetitive_tokens(256 * 30))  # this model has no positions, so windows are of 256 tokens
    assert begun("Granite-4", "--text", "ids.npy")["study"] == "Granite-4.toml"
    assert begun("my.safetensors", "--text", "ids.npy")["study"] == "my.toml"


@pytest.mark.slow
def test_a_newcomer_gets_to_an_exported_file_by_what_is_printed(folder: Path) -> None:
    """Each command is the one that the one before it printed."""
    first = ssm_mp("init", "small/model.safetensors", "--text", "texts", cwd=folder)
    lines = [line for line in first.stdout.splitlines() if "ssm-mp search" in line]
    dry, search = (line[line.index("ssm-mp") :].split("   (")[0] for line in lines)
    planned = ssm_mp(*shlex.split(dry)[1:], cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert "components" in planned.stdout
    assert not (folder / "runs").exists()
    asked = ["--set", "precision.choices=['fp16','int8']", "--trials", "6", "--set", "search.budget_percent=50"]
    done = ssm_mp(*shlex.split(search)[1:], *asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    report, page, _, export = done.stderr.splitlines()[-4:]
    assert report == "report    runs/small/report.md, with plots"
    assert page == "explore   runs/small/report.html, in a browser"
    assert (folder / "runs" / "small" / "report.html").stat().st_size > 0
    ended = ssm_mp(*shlex.split(export.removeprefix("export"))[1:], cwd=folder)
    assert ended.returncode == 0, ended.stderr
    load_artifact(folder / "exports" / "small")
