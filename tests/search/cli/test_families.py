"""The commands on folders of several families, as `transformers` wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from search.cli.main import app
from ssm_mp.artifact import read_artifact
from ssm_mp.components import find_components
from ssm_mp.errors import SsmMpError
from tests.families.models import checkpoint_of, write_family_study
from tests.families.tiny_models import VOCABULARY

FAMILIES = ("granitemoehybrid/experts", "nemotron_h/experts", "lfm2/plain")


def characters(folder: Path) -> Path:
    """A vocabulary of the tiny models' size, one character each."""
    file = folder / "char2id.json"
    file.write_text(json.dumps({chr(32 + i): i for i in range(VOCABULARY)}))
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.mark.parametrize("source", FAMILIES)
def test_a_folder_is_inspected_evaluated_converted_and_continued(source: str, tmp_path: Path) -> None:
    study = write_family_study(tmp_path, source)
    folder = tmp_path / "model"
    components = find_components(checkpoint_of(source))
    seen = answer("inspect", folder)
    assert seen["family"] == source.split("/", maxsplit=1)[0]
    assert [row["name"] for row in seen["components"]] == [c.name for c in components]
    assert seen["fp32_bytes"] == sum(c.fp32_bytes for c in components)
    shown = run("inspect", folder).stdout
    assert all(c.name in shown for c in components)
    whole = answer("evaluate", folder, "--study", study)
    rules = tmp_path / "map.toml"
    rules.write_text('"*" = "int8"\n"layers.0.*" = "nf4"\n')
    made = answer("convert", folder, "--map", rules, "--study", study, "--out", tmp_path / "out")
    artifact = read_artifact(tmp_path / "out")
    assert made["bytes"] == artifact.tensor_bytes
    again = answer("evaluate", tmp_path / "out", "--study", study)
    assert again["perplexity"] == pytest.approx(made["perplexity"], rel=1e-6)
    assert made["increase_percent"] == pytest.approx(100 * (again["perplexity"] / whole["perplexity"] - 1), abs=1e-3)
    for path in (folder, tmp_path / "out"):
        found = answer("generate", path, "--prompt", "abc", "--tokenizer", characters(tmp_path), "--tokens", 4)
        assert (found["prompt_tokens"], found["new_tokens"]) == (3, 4)


@pytest.mark.parametrize("source", ["granitemoehybrid/experts", "falcon_h1/norm-then-gate"])
def test_a_split_of_the_study_is_converted_by_its_pieces(source: str, tmp_path: Path) -> None:
    study = write_family_study(tmp_path, source, '[precision]\nsplit = ["in_proj"]\nchoices = ["fp16", "int8", "nf4"]')
    rules = tmp_path / "map.toml"
    rules.write_text('"*" = "fp16"\n"layers.*.in_proj.z" = "nf4"\n"layers.*.in_proj.x" = "int8"\n')
    folder, out = tmp_path / "model", tmp_path / "out"
    answer("convert", folder, "--map", rules, "--study", study, "--out", out)
    held = read_artifact(out).precision_map
    assert [held[f"layers.0.mamba.in_proj.{piece}"] for piece in ("z", "x", "B", "C", "dt")] == [
        "nf4", "int8", "fp16", "fp16", "fp16",
    ]  # fmt: skip
    assert answer("drift", out, "--study", study)["windows"] == 6
    words = characters(tmp_path)
    found = answer(
        "generate", out, "--study", study, "--tokenizer", words, "--prompt", "ab", "--tokens", 3, "--compare"
    )
    assert found["compare"].keys() == {"fp32", "fp16", "artifact"}


def test_tokens_beyond_those_of_training_are_refused_where_there_is_attention(tmp_path: Path) -> None:
    study = write_family_study(tmp_path, "lfm2/plain")
    folder = tmp_path / "model"
    said = "the model was trained with at most 128 tokens at once"
    asked = run("generate", folder, "--prompt", "abc", "--tokenizer", characters(tmp_path), "--tokens", 127)
    assert isinstance(asked.exception, SsmMpError)
    assert f"127 new tokens after a prompt of 3, but {said}: at most 126 new ones" in str(asked.exception)
    assert (
        answer("generate", folder, "--prompt", "abc", "--tokenizer", characters(tmp_path), "--tokens", 126)[
            "new_tokens"
        ]
        == 126
    )
    text = study.read_text()
    study.write_text(text.replace("window = 24", "window = 129"))
    wide = run("evaluate", folder, "--study", study)
    assert isinstance(wide.exception, SsmMpError)
    assert str(wide.exception) == f"[data] window = 129, but {said}; expected at most 128"
    study.write_text(text)
    assert answer("drift", folder, "--study", study)["long_refused"].startswith(said)


def test_a_model_without_attention_reads_windows_of_any_length(tmp_path: Path) -> None:
    study = write_family_study(tmp_path, "mamba2/groups-2", windows=(1, 2, 2))
    study.write_text(study.read_text().replace("window = 24", "window = 300"))
    assert answer("evaluate", tmp_path / "model", "--study", study)["tokens"] == 2 * 299
