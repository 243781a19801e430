"""The commands for many workers, where one process shows what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from search.cli import cluster
from search.problem.run_directory import CERTIFICATE, RunDirectory
from search.problem.spec import load_spec
from tests.tiny import write_study


def test_a_study_that_another_worker_finishes_meanwhile_is_not_finished_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned, run = RunDirectory.owned, RunDirectory(tmp_path / "run")
    run.path.mkdir()

    @contextmanager
    def late(held: RunDirectory) -> Iterator[None]:
        (held / CERTIFICATE).write_text("{}")  # by a worker that had the directory a moment before
        with owned(held):
            yield

    def again(*_: object) -> None:
        raise AssertionError("finished a second time")

    monkeypatch.setattr(RunDirectory, "owned", late)
    monkeypatch.setattr("search.run.one_process.finish_prepared", again)
    cluster._finish_last(load_spec(write_study(tmp_path)), run)
