"""Help, version, completion and the options of the whole command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search.base.saying import QUIET
from search.cli.main import app
from search.cli.panels import PANELS
from tests.search.cli.test_main import COMMAND, ENVIRONMENT
from tests.tiny import write_study

LISTED = re.compile(r"^  ([a-z]+)  ", re.MULTILINE)


def helped(*arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments, "--help"], prog_name="ssm-mp").stdout


def test_help_shows_the_main_job_first_and_the_cluster_last() -> None:
    text = helped()
    places = [text.index(f"{panel}:") for panel in PANELS]
    assert places == sorted(places)
    expected = [name for names in PANELS.values() for name in names]
    found = LISTED.findall(text[places[0] :])
    assert found == [name for name in expected if name in found]
    assert found[:2] == ["init", "search"]
    assert found[-5:] == ["launch", "prepare", "worker", "finish", "proxy"]


def test_every_command_stands_in_a_panel_and_has_an_example() -> None:
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        assert any(name in names for names in PANELS.values()), name
        assert command.epilog is not None
        assert "Example" in command.epilog


def test_quiet_may_stand_anywhere_but_behind_two_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = str(write_study(tmp_path))
    monkeypatch.setenv(QUIET, "")
    for arguments in (["--quiet", "status", study], ["status", "-q", study], ["status", study, "--quiet"]):
        os.environ[QUIET] = ""
        CliRunner().invoke(app, arguments)
        assert os.environ[QUIET] == "1"
    os.environ[QUIET] = ""
    done = CliRunner().invoke(app, ["status", "--", "--quiet"])
    assert (os.environ[QUIET], done.exit_code != 0) == ("", True)


@pytest.mark.slow
def test_quiet_leaves_the_answer_and_the_errors(tmp_path: Path) -> None:
    write_study(tmp_path)
    loud, quiet = (
        subprocess.run(
            [*COMMAND, "launch", "tiny.toml", "--dry-run", "--set", "slurm.gres=gpu:1", *extra],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True,
        )
        for extra in ([], ["--quiet"])
    )  # fmt: skip
    assert loud.stderr.startswith("note: ")
    assert (quiet.stderr, quiet.stdout) == ("", loud.stdout)
    wrong = subprocess.run(
        [*COMMAND, "--quiet", "front", "tiny.toml"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert (wrong.returncode, wrong.stderr.startswith("error: runs/tiny: no search has been run here")) == (2, True)


@pytest.mark.parametrize("command", [COMMAND, [sys.executable, "-m", "ssm_mp"]])
def test_the_version_is_that_of_what_is_installed(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "--version"], env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True
    )  # fmt: skip
    assert done.stdout == f"ssm-mp {version('ssm-mp')}\n"


def test_a_shell_is_told_the_commands_that_begin_so() -> None:
    asked = {"_SSM_MP_COMPLETE": "complete_bash", "COMP_WORDS": "ssm-mp se", "COMP_CWORD": "1"}
    done = subprocess.run(COMMAND, env={**ENVIRONMENT, **asked}, capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.split() == ["search"]


def test_help_of_a_terminal_says_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "rich_markup_mode", "rich")
    monkeypatch.setenv("COLUMNS", "240")
    for name in ("search", "init", "worker"):
        drawn = helped(name)
        assert "╭" in drawn
        monkeypatch.setattr(app, "rich_markup_mode", None)
        plain = helped(name)
        monkeypatch.setattr(app, "rich_markup_mode", "rich")
        own = {word for word in re.findall(r"[A-Za-z<>./=`-]+", plain) if len(word) > 3 and not word.endswith(":")}
        missing = {word for word in own if word not in drawn}
        assert not missing
