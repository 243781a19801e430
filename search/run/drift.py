"""What a run directory keeps of drifts: those measured of artifacts, by the artifact's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.base.errors import StudyError
from search.problem.run_directory import DRIFT, RunDirectory
from ssm_mp.evaluation.drift import Drift


def keep_drift(run: RunDirectory, path: str, held: Mapping[str, str], found: Drift, long: Drift | None) -> None:
    """Keep the drift of an artifact, in the study's windows and in longer ones; held: its precision map."""
    measured = {
        "map": dict(held), "windows": found.to_json(), "long": None if long is None else long.to_json(),
    }  # fmt: skip
    with run.lock(DRIFT).held():
        run.write_json(DRIFT, {**stored_drift(run), path: measured})


def stored_drift(run: RunDirectory) -> dict[str, Any]:
    """What is kept, by path; empty where nothing was measured. Raises StudyError where it is damaged."""
    stored = run.read_json(DRIFT) or {}
    whole = isinstance(stored, dict) and all(
        isinstance(one, dict) and {"map", "windows", "long"} <= one.keys() for one in stored.values()
    )
    if not whole:
        raise StudyError(f"{run / DRIFT}: damaged; remove it, and measure again with `ssm-mp drift`")
    return stored
