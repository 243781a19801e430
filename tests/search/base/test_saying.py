"""What is said, when, and with what before it."""

from __future__ import annotations

import logging

import pytest

from search.base.saying import QUIET, Said, dated, is_quiet, say


def test_lines_have_their_time_in_jobs_of_slurm_only() -> None:
    assert dated("a line", {}) == "a line"
    found = dated("a line", {"SLURM_JOB_ID": "12"})
    assert found.endswith("  a line")
    assert found[:2] == "20"


def test_only_errors_are_said_where_it_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv(QUIET, raising=False)
    say("loud")
    monkeypatch.setenv(QUIET, "1")
    say("note: quiet")
    say("error: wrong")
    assert capsys.readouterr().err == "loud\nerror: wrong\n"


def test_quiet_is_one_and_nothing_else() -> None:
    assert is_quiet({QUIET: "1"})
    assert not is_quiet({QUIET: ""})
    assert not is_quiet({})


def test_what_is_logged_is_said_as_everything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    logger, handler = logging.getLogger("ssm_mp.of_a_test"), Said()
    logger.addHandler(handler)
    try:
        logger.warning("note: %s", "slower")
        monkeypatch.setenv(QUIET, "1")
        logger.warning("note: %s", "quiet")
    finally:
        logger.removeHandler(handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("  note: slower")
