"""A PATH with nothing on it but stand-ins for Slurm's programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.slurm.stand_ins import Programs


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", str(made.folder))
    return made
