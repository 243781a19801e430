"""The end of a search: what becomes of a former winner, and what is said where the export fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from search.problem.run_directory import REPORT, WINNER, RunDirectory
from search.problem.spec import load_spec
from search.results import export
from search.results.gates import overall
from search.run.finish import clear_winner
from search.run.one_process import run_search
from ssm_mp.artifact import is_artifact, save_artifact
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.errors import DataError
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import MAMBA, random_model, write_study


@pytest.fixture
def winner(tmp_path: Path) -> Path:
    model = random_model(MAMBA)
    chosen = PrecisionMap.uniform("int8", find_components(model))
    converted = convert(model, chosen, Scheme("none"))
    return save_artifact(tmp_path / "winner", converted, chosen, Scheme("none"), {}, extra={"allocation.png": b"1"})


def test_a_former_winner_goes(winner: Path) -> None:
    said: list[str] = []
    clear_winner(winner, said.append)
    clear_winner(winner, said.append)
    assert os.listdir(winner.parent) == []
    assert said == []


def test_files_of_the_users_beside_a_former_winner_are_kept(winner: Path, tmp_path: Path) -> None:
    for text in ("first", "second"):
        if not winner.exists():
            winner.mkdir()
            again = random_model(MAMBA)
            chosen = PrecisionMap.uniform("fp16", find_components(again))
            save_artifact(winner, convert(again, chosen, Scheme("none")), chosen, Scheme("none"), {})
        (winner / "notes.txt").write_text(text)
        said: list[str] = []
        clear_winner(winner, said.append)
        assert len(said) == 1
        assert not winner.exists()
    kept = [tmp_path / "winner-kept-1", tmp_path / "winner-kept-2"]
    assert [(folder / "notes.txt").read_text() for folder in kept] == ["first", "second"]
    assert str(kept[1]) in said[0]
    assert [os.listdir(folder) for folder in kept] == [["notes.txt"], ["notes.txt"]]


def test_what_stands_in_the_winners_place_and_is_no_artifact_is_left_alone(tmp_path: Path) -> None:
    for name in ("file", "folder/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "folder", "link", "nothing"):
        clear_winner(tmp_path / name, pytest.fail)
        assert not is_artifact(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]
    assert (tmp_path / "link/notes.txt").read_text() == "mine"


def test_a_tokenizer_that_is_gone_at_the_end_fails_the_gate_and_leaves_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> bytes:
        raise DataError("no tokenizer at there/tokenizer.json")

    monkeypatch.setattr(export, "tokenizer_json", gone)
    overrides = ["search.trials=3", "search.seeds=0", "search.probe=none", "search.budget_percent=1000"]
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    result = run_search(load_spec(write_study(tmp_path), overrides), run, said.append)
    assert result.certificate is not None
    assert result.certificate.winner is not None
    assert "error: no tokenizer at there/tokenizer.json" in said
    assert overall(result.gates) == "fail"
    assert "no tokenizer at there/tokenizer.json" in (run / REPORT).read_text(encoding="utf-8")
    assert not (run / WINNER).exists()
