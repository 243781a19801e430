"""Which map of a finished search to export: the certified winner, the knee, the fastest, or a trial by number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.study import Study

from search.base.errors import NothingFoundError, StudyError
from search.base.front import Point, fastest, knee, pareto_front
from search.measure.latency import stored_latency
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec
from search.problem.workspace import Workspace, open_workspace
from search.results.certify import Certificate
from search.results.export import Exported, export, timing_seconds
from search.results.known import known_of, seconds_spent
from search.run.certifying import certify_alone
from search.run.ends import known_baseline
from search.run.fidelity import stored_fidelity
from search.run.grouping import grouped_as_stored
from search.run.stored import stored_certificate
from search.trials.read_back import points
from ssm_mp.artifact import require_free


def pick_point(pick: str, found: Sequence[Point], budget_percent: float, winner: int | None) -> Point:
    """The point that `pick` names. Raises NothingFoundError where the study has none, StudyError for a wrong word."""
    front = pareto_front(found, budget_percent)
    if pick == "smallest":
        chosen = next((point for point in front if point.trial == winner), None)
        if chosen is None:
            raise NothingFoundError(
                "no map of this study is certified for this budget and confidence, so there is no smallest to export; "
                "run its search (again), or name a map with --pick knee or --pick TRIAL"
            )
        return chosen
    if pick == "knee":
        point = knee(front)
        if point is None:
            raise NothingFoundError("no map of this study is within the budget, so its front has no knee")
        return point
    if pick == "fastest":
        if found and all(point.latency is None for point in found):
            raise StudyError(
                '--pick fastest: this study knows no latencies; one with [search] objectives = ["compression", '
                '"perplexity", "latency"] does'
            )
        point = fastest(front)
        if point is None:
            raise NothingFoundError("no map of this study is within the budget, so there is no fastest")
        return point
    if not pick.isdecimal():
        raise StudyError(f"--pick {pick}: expected smallest, knee, fastest or a trial's number")
    for point in found:
        if point.trial == int(pick):
            return point
    numbers = f"0 to {max(p.trial for p in found)}" if found else "none"
    raise StudyError(f"--pick {pick}: no finished trial has this number (finished: {numbers})")


@dataclass(frozen=True, eq=False)
class Picked:
    """A map of a study, ready to be exported. `certificate` is of this map."""

    workspace: Workspace
    point: Point
    certificate: Certificate | None

    @property
    def verdict(self) -> str:
        """The certificate's."""
        return self.certificate.verdict if self.certificate else "inconclusive"


def picked(spec: StudySpec, run: RunDirectory, study: Study, pick: str, say: Callable[[str], None]) -> Picked:
    """The map of a study that `pick` names.

    A map other than the certified winner is held against the certify windows by itself.
    """
    found = points(study, run.space())
    front = pareto_front(found, spec.search.budget_percent)
    certificate = stored_certificate(run, spec, front)
    winner = None if certificate is None else certificate.winner
    point = pick_point(pick, found, spec.search.budget_percent, winner)
    opened = open_workspace(spec, say, run.path)
    workspace = grouped_as_stored(opened, run) or opened
    run.check_fingerprint(workspace.fingerprint())
    if point.trial != winner:
        certificate = certify_alone(workspace, run, point, say)
    return Picked(workspace, point, certificate)


def export_pick(
    spec: StudySpec,
    run: RunDirectory,
    study: Study,
    pick: str,
    out: str | Path,
    *,
    replace: bool,
    say: Callable[[str], None],
) -> tuple[Exported, str]:
    """Export a map of a study; returns it and its certificate's verdict."""
    require_free(out, replace)
    found = picked(spec, run, study, pick, say)
    workspace = found.workspace
    exported = export(
        workspace,
        known_baseline(run, workspace),
        workspace.space.map(found.point.map),
        out,
        certificate=found.certificate,
        provenance={"trial": found.point.trial},
        known=known_of(study, found.point.trial),
        replace=replace,
        seconds=timing_seconds(seconds_spent(study, time.time())),
        say=say,
        latency=stored_latency(run),
        fidelity=stored_fidelity(run, found.point.trial),
    )
    return exported, found.verdict
