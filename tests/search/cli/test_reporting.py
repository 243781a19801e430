"""The command `report`: the page written again, opened, or refused in one line."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from search.cli import main
from search.problem.run_directory import COMPONENTS, PAGE, REPORT
from tests.search.searched import Searched
from tests.tiny import write_study


def arguments(searched: Searched, *further: str) -> list[str]:
    """The command, with the overrides that the search had."""
    overrides = [part for one in searched.spec.overrides for part in ("--set", one)]
    return ["report", str(searched.spec.path), "--run-dir", str(searched.run.path), *overrides, *further]


def report(searched: Searched, *further: str) -> Result:
    """What the command answers."""
    done = CliRunner().invoke(main.app, arguments(searched, *further), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What is said of a command that is the user's mistake."""
    found = CliRunner().invoke(main.app, [*given])
    assert isinstance(found.exception, Exception), found.output
    assert main._explained(found.exception) == 2
    return capsys.readouterr().err.strip()


def test_it_writes_the_same_page_that_the_search_left_and_nothing_else(searched: Searched) -> None:
    page, before = (searched.run / PAGE).read_bytes(), (searched.run / REPORT).stat().st_mtime_ns
    (searched.run / PAGE).unlink()
    assert json.loads(report(searched, "--json").stdout) == {"page": str(searched.run / PAGE)}
    assert (searched.run / PAGE).read_bytes() == page
    assert (searched.run / REPORT).stat().st_mtime_ns == before


@pytest.mark.parametrize("there", [True, False])
def test_it_opens_the_page_or_says_where_it_is(
    searched: Searched, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    opened: list[str] = []

    def open_(address: str) -> bool:
        opened.append(address)
        return there

    monkeypatch.setattr(webbrowser, "open_new_tab", open_)
    done = report(searched, "--open")
    assert opened == [(searched.run / PAGE).absolute().as_uri()]
    assert ("no browser was found" in done.stderr) is not there


def test_a_run_of_an_older_version_is_refused_with_what_writes_the_missing_file(
    searched: Searched, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (searched.run / COMPONENTS).read_bytes()
    (searched.run / COMPONENTS).unlink()
    try:
        said = refused(capsys, *arguments(searched))
    finally:
        (searched.run / COMPONENTS).write_bytes(kept)
    assert "components.json: missing" in said
    assert "`ssm-mp search` or `finish` writes it" in said


def test_a_study_that_was_not_begun_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "report", str(write_study(tmp_path)), "--run-dir", str(tmp_path / "run"))
    assert "no search has been run here yet" in said
    assert not (tmp_path / "run").exists()
