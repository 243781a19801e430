"""The winner beside FP32 on the certify windows, measured once and kept in the run directory."""

from __future__ import annotations

from typing import Any

from search.base.errors import StudyError
from search.base.fidelity import Fidelity, fidelity_from_json
from search.base.front import Point
from search.base.progress import slow
from search.problem.run_directory import FIDELITY, RunDirectory, mark_of
from search.problem.workspace import Workspace
from search.results.fidelity import fidelity_of
from ssm_mp.evaluation.compare import depart, expect
from ssm_mp.evaluation.evaluate import Evaluation, layer_calls


def measured_fidelity(workspace: Workspace, run: RunDirectory, winner: Point, fp32: Evaluation) -> Fidelity:
    """How far a winner's predictions are from FP32's, on all certify windows; fp32: its evaluation there."""
    windows, mark = workspace.splits.certify, _mark(workspace, winner)
    stored = run.read_json(FIDELITY)
    if isinstance(stored, dict) and stored.get("mark") == mark:
        return _read(stored, run)
    progress = slow("the winner beside FP32", 2 * layer_calls(workspace.model, windows))
    model = workspace.converter.convert(workspace.space.map(winner.map))
    expected = expect(workspace.model, windows, progress.step)
    found = depart(model, windows, expected, progress.step)
    progress.close()
    kept = fidelity_of(found, fp32, windows.sources)
    by_window = {"nll": found.nll.tolist(), "kl": found.kl.tolist(), "changed": found.changed.tolist()}
    content = {"mark": mark, "trial": winner.trial, "fidelity": kept.to_json(), "predicted": found.predicted}
    run.write_json(FIDELITY, {**content, "windows": by_window})
    return kept


def stored_fidelity(run: RunDirectory, winner: int | None) -> Fidelity | None:
    """What is kept of a winner; None where it was not measured, or another's was."""
    stored = run.read_json(FIDELITY)
    same = winner is not None and isinstance(stored, dict) and stored.get("trial") == winner
    return _read(stored, run) if same else None


def _read(stored: dict[str, Any], run: RunDirectory) -> Fidelity:
    try:
        return fidelity_from_json(stored["fidelity"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{run / FIDELITY}: damaged ({error}); remove it and run the search again") from None


def _mark(workspace: Workspace, winner: Point) -> str:
    depends = {"study": workspace.fingerprint_digest, "certify windows": workspace.splits.certify.digest}
    return mark_of({**depends, "map": dict(winner.map)})
