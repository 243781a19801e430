"""optuna-dashboard works on the database that a search keeps its trials in, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.private_postgres import PrivatePostgres
from tests.search.run.claiming import Bench
from tests.search.trials.dashboard import require_shown


def test_the_dashboard_shows_a_study_on_postgresql(
    postgres: PrivatePostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)
    address = postgres.create_database("dashboard")
    bench = Bench.at(tmp_path, "postgresql", address)
    try:
        require_shown(bench, address)
    finally:
        bench.close()
