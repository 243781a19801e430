from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from search.problem.memory import SHARE
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.run import local_workers
from search.run.local_workers import run_local
from ssm_mp.evaluation.memory import Limit


def test_the_processes_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str | None] = {}

    def tell(who: str, found: Any) -> Any:
        def record(*_: object) -> Any:
            told[who] = os.environ.get(SHARE)
            return found

        return record

    monkeypatch.delenv(SHARE, raising=False)
    monkeypatch.setattr(local_workers, "memory_limit", lambda: Limit(10_000, "this machine has free"))
    for name in ("choose_storage", "require_reachable", "_watch"):
        monkeypatch.setattr(local_workers, name, lambda *_, **__: None)
    for name, found in (("prepare_alone", None), ("finish_prepared", None), ("_start", _Ended())):
        monkeypatch.setattr(local_workers, name, tell(name, found))
    path = tmp_path / "study.toml"
    path.write_text('[checkpoint]\npath = "model.safetensors"\n', encoding="utf-8")
    run_local(load_spec(path), RunDirectory(tmp_path / "run"), [], 4, lambda line: None)
    assert told == {"prepare_alone": "2000", "_start": "2000", "finish_prepared": None}


class _Ended:
    """A process that has ended well."""

    returncode = 0
