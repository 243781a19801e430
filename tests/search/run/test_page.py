"""What a run directory says of its search, gathered for the page."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.run_directory import DRIFT, FRONT, PROVENANCE, RunDirectory
from search.problem.spec import load_spec
from search.run.page import export_command, export_winner_command
from search.run.stored import content_now
from search.trials.storage import read_study
from tests.search.searched import Searched
from tests.tiny import write_study


def words(parts: tuple[str, str, str], trial: int) -> list[str]:
    """The command that exports a trial."""
    return shlex.split(str(trial).join(parts))


def test_the_command_repeats_what_the_search_was_asked_and_leaves_out_what_an_export_does_not_need(
    tmp_path: Path,
) -> None:
    study = write_study(tmp_path)
    asked = ["search.trials=9", "search.force_baseline=true", "data.seed=3"]
    spec = load_spec(study, asked)
    run = RunDirectory.of(spec)
    common = ["ssm-mp", "export", str(study), "--set", "data.seed=3"]
    assert words(export_command(spec, run), 7) == [*common, "--pick", "7", "--out", "exports/tiny-trial-7"]
    assert shlex.split(export_winner_command(spec, run)) == [*common, "--out", "exports/tiny"]
    elsewhere = words(export_command(spec, RunDirectory(tmp_path / "a b")), 7)
    assert elsewhere[3:5] == ["--run-dir", str(tmp_path / "a b")]


def test_the_command_of_a_search_for_a_runtime_writes_its_file(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    spec = load_spec(study, ["export.target=gguf"])
    found = words(export_command(spec, RunDirectory.of(spec)), 12)
    assert found[3:] == [
        "--set", "export.target=gguf", "--format", "gguf", "--pick", "12", "--out", "exports/tiny-trial-12.gguf",
    ]  # fmt: skip


@pytest.fixture
def copied(searched: Searched, tmp_path: Path) -> Searched:
    """The same search in a directory that a test may change."""
    folder = tmp_path / "run"
    shutil.copytree(searched.run.path, folder)
    return Searched(searched.spec, RunDirectory(folder))


def test_gates_of_a_former_end_are_not_those_of_a_search_that_has_gone_on(copied: Searched) -> None:
    assert [gate.name for gate in copied.content().gates][:2] == ["quality", "compression"]
    answer = json.loads((copied.run / FRONT).read_text(encoding="utf-8"))
    copied.run.write_json(FRONT, {**answer, "trials": answer["trials"] - 1})
    assert copied.content().gates == []


def test_a_search_that_has_not_ended_shows_its_fingerprint_and_no_certificate(copied: Searched) -> None:
    for name in (PROVENANCE, FRONT, "certificate.json"):
        (copied.run / name).unlink()
    content = copied.content()
    assert content.certificate is None
    assert content.said == "Not certified yet."
    assert set(content.provenance) == {"fingerprint"}
    assert len(content.points) == 9


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (FRONT, '{"trials": 9, "winner": WINNER, "gates": [{"x": 1}]}', r"front\.json: damaged"),
        (DRIFT, '{"small": {"map": {}}}', r"drift\.json: damaged; remove it"),
        (DRIFT, "[", r"drift\.json: damaged"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(copied: Searched, name: str, text: str, said: str) -> None:
    winner = json.loads((copied.run / FRONT).read_text(encoding="utf-8"))["winner"]
    (copied.run / name).write_text(text.replace("WINNER", str(winner)), encoding="utf-8")
    with pytest.raises(StudyError, match=said):
        content_now(copied.spec, copied.run, read_study(copied.run))
