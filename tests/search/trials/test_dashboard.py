"""optuna-dashboard works on the files that a search keeps its trials in, as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.problem.run_directory import DATABASE, JOURNAL
from tests.search.run.claiming import Bench
from tests.search.trials.dashboard import require_shown


@pytest.mark.parametrize(
    ("kind", "address"), [("sqlite", f"sqlite:///{{}}/{DATABASE}"), ("journal", f"{{}}/{JOURNAL}")]
)
def test_the_dashboard_shows_a_study_while_it_goes_on(tmp_path: Path, kind: str, address: str) -> None:
    bench = Bench.at(tmp_path, kind)
    require_shown(bench, address.format(bench.run.path))
