"""Other tools' mixed-precision searches beside ours, on one study and through one evaluation.

    pip install --constraint constraints.txt '.[bench]'
    python -m benchmarks.peers --run runs/reference-cumulative [--json]

Each tool searches the plain PyTorch build of the study's checkpoint, on the study's search windows, with formats that
store what ours store. What it chooses becomes precision maps of the study's own choices (a tool's int4 is nf4 where the
study has that), which are converted, measured and sized as our own trials are, calibration and compensated rounding
included: what is compared is how the tools choose, not how they round. A tool that is not installed is left out; one
that fails is reported with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peer_aimet, peer_modelopt
from benchmarks.peer_problem import Found, Problem
from search.base.front import Point, pareto_front
from search.measure.objective import Measured, Objective, measure_baseline
from search.problem.run_directory import PROBES, RunDirectory, require_same
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.trials.read_back import points
from search.trials.storage import read_study
from ssm_mp.precision_map import PrecisionMap

STUDY = Path("studies/reference-cumulative.toml")

PEERS: dict[str, Callable[[Problem], Found]] = {"modelopt": peer_modelopt.search, "aimet": peer_aimet.search}
_PACKAGES = frozenset({"modelopt", "aimet_torch"})
"""A tool whose package is missing is left out; one that lacks something else has failed."""

UNDECIDED = ("fp16", "int8")
"""What components get that a tool cannot decide about: left alone, and, so as not to hold that against it, int8."""


@dataclass(frozen=True)
class PeerPoint:
    """One map of a tool, measured by our objective on the search windows."""

    origin: str
    bytes: int
    increase_percent: float
    stderr_percent: float
    perplexity: float
    map: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Ours:
    """A finished run of our own search: every map it measured, and how many probes it made before."""

    name: str
    points: tuple[Point, ...]
    probes: int


def compare(study: Path, run: Path | None) -> dict[str, Any]:
    """Each installed tool's answer, measured by us, and beside it our front where a run directory is given.

    Raises StudyError where the run is of another study or the plain model is not the checkpoint's.
    """
    workspace = open_workspace(load_spec(study), _say)
    ours = None if run is None else _ours(workspace, run)
    problem = Problem(workspace)
    difference = problem.logit_difference()
    baseline = measure_baseline(workspace)
    objective = Objective(workspace, baseline)
    seen: dict[PrecisionMap, Measured] = {}

    def measure(precision_map: PrecisionMap) -> Measured:
        if precision_map not in seen:
            seen[precision_map] = objective(precision_map)
        return seen[precision_map]

    answers: dict[str, Any] = {}
    for name, search in PEERS.items():
        _say(f"{name}: searching")
        try:
            found = search(problem)
        except Exception as error:  # a tool may fail in any way, and that is a result
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _PACKAGES:
                _say(f"{name}: left out ({error})")
                continue
            _say(traceback.format_exc())
            answers[name] = _failure(error)
            continue
        _say(f"{name}: measuring {len(found.decisions)} decisions")
        answers[name] = _answer(problem, found, measure, ours, difference)
    return answers


def beside_former(former: Path, study: Path, run: Path) -> dict[str, Any]:
    """The saved answer of an earlier comparison, with this run of ours put beside the points measured then."""
    ours = _ours(open_workspace(load_spec(study), _say), run)
    answers: dict[str, Any] = json.loads(former.read_text(encoding="utf-8"))
    for answer in answers.values():
        if "points" in answer:
            theirs = [PeerPoint(**point) for point in answer["points"]]
            answer["ours"] = _beside(ours, theirs, answer["budget_percent"])
    return answers


def _failure(error: Exception) -> dict[str, Any]:
    """What stopped a tool, and the last places in its code."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": {"type": type(error).__name__, "message": str(error), "where": where}}


def _answer(
    problem: Problem, found: Found, measure: Callable[[PrecisionMap], Measured], ours: Ours | None, difference: float
) -> dict[str, Any]:
    """One tool's part of the result."""
    measured = _measured(problem, found, measure)
    budget = problem.budget_percent
    within = [point for point in measured if point.increase_percent <= budget]
    smallest = min(within, key=lambda point: (point.bytes, point.increase_percent), default=None)
    undecided = sorted(problem.free_modules() - found.decides)
    distinct = len({problem.map(decision, found.decides, UNDECIDED[0]) for decision in found.decisions})
    answer: dict[str, Any] = {
        "version": found.version,
        "settings": dict(found.settings),
        "notes": list(found.notes),
        "cannot_decide": undecided,
        "logit_difference": difference,
        "budget_percent": budget,
        "bytes_within_budget": None if smallest is None else smallest.bytes,
        "smallest_within_budget": None if smallest is None else smallest.to_json(),
        "evaluations": {
            "search": round(found.evaluations, 2),
            "maps": distinct,
            "total": round(found.evaluations + distinct, 2),
            "counted": f"{found.counted}; then one for each different map, which somebody has to measure to choose",
        },
        "seconds": round(found.seconds, 1),
        "points": [point.to_json() for point in measured],
    }
    return answer if ours is None else answer | {"ours": _beside(ours, measured, budget)}


def _measured(problem: Problem, found: Found, measure: Callable[[PrecisionMap], Measured]) -> list[PeerPoint]:
    """Every different map of a tool's decisions, the smallest first."""
    collected: dict[PrecisionMap, PeerPoint] = {}
    complete = problem.free_modules() <= found.decides
    for undecided in UNDECIDED[:1] if complete else UNDECIDED:
        for decision in found.decisions:
            precision_map = problem.map(decision, found.decides, undecided)
            if precision_map in collected:
                continue
            value = measure(precision_map)
            collected[precision_map] = PeerPoint(
                origin=decision.origin + ("" if complete else f", what it cannot decide {undecided}"),
                bytes=value.bytes,
                increase_percent=value.increase.percent,
                stderr_percent=value.increase.stderr_percent,
                perplexity=value.perplexity,
                map=precision_map.to_json(),
            )
    return sorted(collected.values(), key=lambda point: (point.bytes, point.increase_percent))


def _ours(workspace: Workspace, path: Path) -> Ours:
    """Our run of the same study. Raises StudyError where it is of another."""
    run = RunDirectory(path)
    require_same(run.fingerprint(), json.loads(json.dumps(workspace.fingerprint())), str(path))
    found = tuple(points(read_study(run), run.space()))
    return Ours(path.name, found, len(run.read_lines(PROBES)))


def _beside(ours: Ours, theirs: Sequence[PeerPoint], budget: float) -> dict[str, Any]:
    """Our front against a tool's points: dominance, and both at equal bytes."""
    front = pareto_front(ours.points, math.inf)
    within = [point for point in theirs if point.increase_percent <= budget]
    smallest = next(iter(pareto_front(ours.points, budget)), None)
    undominated = [point for point in theirs if not _dominated(point, front)]
    return {
        "run": ours.name,
        "evaluations": {"probes": ours.probes, "trials": len(ours.points), "total": ours.probes + len(ours.points)},
        "bytes_within_budget": None if smallest is None else smallest.bytes,
        "dominates_every_point": not undominated,
        "dominates_every_point_within_budget": all(_dominated(point, front) for point in within),
        "not_dominated": [{"origin": p.origin, **_figures(p)} for p in undominated],
        "at_equal_bytes": [_at_equal_bytes(point, front) for point in theirs],
    }


def _dominated(theirs: PeerPoint, front: Sequence[Point]) -> bool:
    """Whether a point of ours is at least as small and at least as good."""
    return any(p.bytes <= theirs.bytes and p.increase_percent <= theirs.increase_percent for p in front)


def _at_equal_bytes(theirs: PeerPoint, front: Sequence[Point]) -> dict[str, Any]:
    """A tool's point, and the best of ours that is no larger."""
    ours = min((p for p in front if p.bytes <= theirs.bytes), key=lambda p: p.increase_percent, default=None)
    return {"theirs": _figures(theirs), "ours": None if ours is None else {"trial": ours.trial, **_figures(ours)}}


def _figures(point: PeerPoint | Point) -> dict[str, Any]:
    return {"bytes": point.bytes, "increase_percent": point.increase_percent, "perplexity": point.perplexity}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(name: str, answer: dict[str, Any]) -> str:
    """A tool's result for people."""
    if "error" in answer:
        return f"{name}: failed with {answer['error']['type']}: {answer['error']['message'].splitlines()[0]}"
    lines = [
        f"{name} {answer['version']}: {len(answer['points'])} maps, {answer['evaluations']['total']:g} evaluations, "
        f"smallest within {answer['budget_percent']:g} %: {answer['bytes_within_budget'] or 'none'} bytes"
    ]
    beside = answer.get("ours")
    if beside is not None:
        verdict = "dominates" if beside["dominates_every_point_within_budget"] else "does not dominate"
        lines.append(
            f"  ours: {beside['bytes_within_budget'] or 'none'} bytes after {beside['evaluations']['total']} "
            f"evaluations; {verdict} every point within the budget"
        )
    equal = [None] * len(answer["points"]) if beside is None else beside["at_equal_bytes"]
    for point, pair in zip(answer["points"], equal, strict=True):
        ours = "" if pair is None or pair["ours"] is None else f"  ours {pair['ours']['increase_percent']:+8.3f} %"
        lines.append(f"  {point['bytes']:9,} bytes {point['increase_percent']:+8.3f} %{ours}  {point['origin']}")
    return "\n".join(lines)


def main() -> None:
    """Compare and print tables, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--study", type=Path, default=STUDY)
    arguments.add_argument("--run", type=Path, help="directory of a finished run of the same study")
    arguments.add_argument("--former", type=Path, help="a saved --json answer: do not search again, only compare")
    given = arguments.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # the tools log to standard output
        if given.former is not None and given.run is not None:
            answers = beside_former(given.former, given.study, given.run)
        else:
            answers = compare(given.study, given.run)
    if given.json:
        print(json.dumps(answers))
        return
    print("\n\n".join(_table(name, answer) for name, answer in answers.items()) or "no other tool is installed")


if __name__ == "__main__":
    main()
