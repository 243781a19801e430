"""Which weights of a checkpoint a command and a study take, where it holds several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from search.spec import load_spec
from search.workspace import open_workspace
from ssm_mp.checkpoints import load_checkpoint
from tests.search.test_cli import answer, refused, ssm_mp
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


@pytest.mark.slow
def test_commands_take_the_weights_asked_for(study: Path) -> None:
    folder = study.parent
    assert "also in the file: ema" in ssm_mp("inspect", "both.ckpt", cwd=folder).stderr
    found = answer("inspect", "both.ckpt", "--weights", "ema", cwd=folder)
    assert (found["file_types"], 2 * found["file_bytes"]) == ({"float16": found["parameters"]}, found["fp32_bytes"])
    assert "(float16)" in ssm_mp("inspect", "both.ckpt", "--weights", "ema", cwd=folder).stdout
    assert "no model at --weights swa; there are: ema, model" in refused(
        "inspect", "both.ckpt", "--weights", "swa", cwd=folder
    )
    torch.save({name: t.half() for name, t in random_tensors(MAMBA, seed=1).items()}, folder / "alone.pt")
    alone = answer("evaluate", "alone.pt", "--study", "tiny.toml", cwd=folder)
    assert answer("evaluate", "both.ckpt", "--study", "tiny.toml", "--weights", "ema", cwd=folder) == alone
    assert answer("evaluate", "both.ckpt", "--study", "average.toml", cwd=folder) == alone
    assert answer("evaluate", "both.ckpt", "--study", "tiny.toml", cwd=folder) != alone
    convert = ("convert", "both.ckpt", "--map", "conservative", "--study", "tiny.toml")
    taken = answer(*convert, "--weights", "ema", "--out", "a", cwd=folder)
    assert taken["perplexity"] == pytest.approx(alone["perplexity"], rel=0.1)
    assert answer(*convert, "--out", "b", cwd=folder)["perplexity"] != taken["perplexity"]


def test_the_digest_is_that_of_the_weights_taken(study: Path) -> None:
    both = study.with_name("both.ckpt")
    torch.save(random_tensors(MAMBA), study.with_name("alone.pt"))
    assert load_checkpoint(both).digest == load_checkpoint(study.with_name("alone.pt")).digest
    assert load_checkpoint(both, "ema").digest != load_checkpoint(both).digest
