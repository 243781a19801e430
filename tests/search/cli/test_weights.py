"""Which weights of a checkpoint a command and a study take, where it holds several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from search.cli.main import app
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from tests.tiny import MAMBA, random_tensors, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of a file that holds a model and its average, which has other values and another type."""
    path = write_study(tmp_path)
    average = {name: tensor.half() for name, tensor in random_tensors(MAMBA, seed=1).items()}
    torch.save({"model": random_tensors(MAMBA), "ema": average}, tmp_path / "both.ckpt")
    text = path.read_text().replace('"model.safetensors"', '"both.ckpt"')
    path.write_text(text)
    (tmp_path / "average.toml").write_text(text.replace('"both.ckpt"', '"both.ckpt"\nweights = "ema"'))
    return path


def test_a_study_takes_the_weights_that_it_names_and_its_fingerprint_knows(study: Path) -> None:
    notes: list[str] = []
    plain = open_workspace(load_spec(study), notes.append)
    assert any("also in the file: ema" in note for note in notes)
    averaged = open_workspace(load_spec(study.with_name("average.toml")))
    assert averaged.checkpoint.file_types.keys() == {"float16"}
    assert plain.fingerprint()["checkpoint"] != averaged.fingerprint()["checkpoint"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_inspect_says_types_and_notes_and_takes_the_weights_asked_for(study: Path) -> None:
    both = study.with_name("both.ckpt")
    assert any("also in the file: ema" in note for note in answer("inspect", both)["notes"])
    found = answer("inspect", both, "--weights", "ema")
    assert (found["file_types"], 2 * found["file_bytes"]) == ({"float16": found["parameters"]}, found["fp32_bytes"])
    assert f"{found['file_bytes']:,} in the file (float16)" in run("inspect", both, "--weights", "ema").stdout
    error = run("inspect", both, "--weights", "swa").exception
    assert isinstance(error, CheckpointError)
    assert "no model at --weights swa; there are: ema, model" in str(error)


def test_evaluate_and_convert_take_the_weights_asked_for_else_the_studys(study: Path) -> None:
    folder, both = study.parent, study.with_name("both.ckpt")
    torch.save({name: tensor.half() for name, tensor in random_tensors(MAMBA, seed=1).items()}, folder / "alone.pt")
    alone = answer("evaluate", folder / "alone.pt", "--study", study)
    assert answer("evaluate", both, "--study", study, "--weights", "ema") == alone
    assert answer("evaluate", both, "--study", study.with_name("average.toml")) == alone
    assert answer("evaluate", both, "--study", study) != alone
    taken = ("--map", "conservative", "--study", study, "--weights", "ema", "--out")
    first = answer("convert", both, *taken, folder / "a")
    second = answer("convert", folder / "alone.pt", *taken[:4], "--out", folder / "b")
    assert first["perplexity"] == second["perplexity"]


def test_the_digest_is_that_of_the_weights_taken(study: Path) -> None:
    both = study.with_name("both.ckpt")
    torch.save(random_tensors(MAMBA), study.with_name("alone.pt"))
    assert load_checkpoint(both).digest == load_checkpoint(study.with_name("alone.pt")).digest
    assert load_checkpoint(both, "ema").digest != load_checkpoint(both).digest
