"""A study whose space has grown is continued: what was measured in the smaller space holds in the larger one as well.

Optuna refuses other choices for a known parameter, so the larger space is a new Optuna study in the same storage, into
which all trials are added with their numbers, which certificates and their ledger refer to. The old study stays as it
was but for one attribute, `MOVED`, which names the new one: that it is written is the one moment when the study moves.
Whatever is killed before begins again, and leaves what is there valid; whatever is killed after is made up for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.errors import StudyError
from search.measure.probe import LOWEST, WIDEST
from search.problem.groups import moving
from search.problem.run_directory import (
    FINGERPRINT,
    PROBES,
    RunDirectory,
    grown,
    grown_in,
    mark_of,
    of_space,
    require_same,
)
from search.problem.spec import StudySpec
from search.run.claim import Choices, take_over
from search.trials.attributes import FINISHED
from search.trials.maps import map_of
from search.trials.optuna_storage import storage_of
from search.trials.owner import LEASES, dead_owners, living_leases
from search.trials.read_back import ASKED, CONTINUES, FINGERPRINT_ATTRIBUTE, study_groups
from search.trials.storage import MOVED, OpenStudy, exists, name_metrics, opened_as_it_is

Space = Mapping[str, list[str]]
"""Every component's choices, the widest first, as a fingerprint holds them."""


def check_or_widen(spec: StudySpec, run: RunDirectory, fingerprint: dict[str, Any], say: Callable[[str], None]) -> None:
    """Store or check a run's fingerprint; where only its space has grown, take over what the run holds.

    Raises StudyError where anything else differs, or somebody works on the run while its space has grown.
    """
    if not _grown(run, fingerprint):
        run.check_fingerprint(fingerprint)
        return
    with run.lock("widening").held():  # of workers that begin together one does it
        if not _grown(run, fingerprint):
            run.check_fingerprint(fingerprint)
            return
        before, now = run.space(), json.loads(json.dumps(fingerprint))["space"]
        moved = ""
        if exists(run):
            _require_without_latency(spec, run)
            moved = _move_trials(spec, run, fingerprint, say)
        probes = _keep_probes(run, fingerprint, before)
        with run.lock(FINGERPRINT).held():
            run.write_json(FINGERPRINT, grown(run.fingerprint(), fingerprint))
    say(f"the space has grown ({_told(before, now)}): {moved}{probes} probes are taken over")


def _grown(run: RunDirectory, fingerprint: Mapping[str, Any]) -> bool:
    stored = run.read_json(FINGERPRINT)
    return isinstance(stored, dict) and grown_in(stored, json.loads(json.dumps(fingerprint)))


def _require_without_latency(spec: StudySpec, run: RunDirectory) -> None:
    if spec.search.asks_latency:
        raise StudyError(
            f"{run.path}: the space of this study has grown, and its latencies were measured for the smaller one; "
            "those of two moments cannot be compared. Restore the space, or give --run-dir another directory"
        )


def _move_trials(spec: StudySpec, run: RunDirectory, fingerprint: Mapping[str, Any], say: Callable[[str], None]) -> str:
    """Continue a run's study in the larger space; what to say of it."""
    opened, now = opened_as_it_is(run, spec, say), json.loads(json.dumps(fingerprint))["space"]
    try:
        study = opened.patiently(lambda: move_study(opened, run, run.space(), now, fingerprint))
        trials = opened.patiently(lambda: study.get_trials(deepcopy=False))
    finally:
        opened.close()
    finished = sum(trial.state in FINISHED for trial in trials)
    return f"{finished} finished trials, which count as trials of this study, and "


def move_study(
    opened: OpenStudy, run: RunDirectory, before: Space, now: Space, fingerprint: Mapping[str, Any] | None = None
) -> Study:
    """Continue a study in a larger space, unless that is done; returns the study that goes on. May be repeated.

    before: what the run directory says, where the study was not signed yet. Raises StudyError where its space has
    what the larger one lacks, or a worker is at work on it. fingerprint: of the study in the larger space, if it says
    more than that.
    """
    study, where = opened.study, f"{run.path} ({opened.choice.kind})"
    held = _space_of(study, before)
    if held == now:
        return study  # one that was killed after the study had moved
    if not grown_in({"space": held}, {"space": now}):
        require_same({"space": held}, {"space": now}, where)
    if not living_leases(run / LEASES):
        together = moving(held, study_groups(study))
        free = {name: tuple(choices) for name, choices in together.items() if len(choices) > 1}
        take_over(opened, free, lambda owners: dead_owners(owners, run / LEASES))
    with opened.locked():
        following = study.user_attrs.get(MOVED)
        if following is not None:  # the answer was lost when it moved
            return optuna.load_study(study_name=following, storage=storage_of(study))
        # a worker holds its lease before it looks whether the study has moved, under this lock
        working = living_leases(run / LEASES)
        if working or any(trial.state == TrialState.RUNNING for trial in study.get_trials(deepcopy=False)):
            raise StudyError(
                f"{where}: the space of this study has grown, and others are still at work on it "
                f"({', '.join(working[:3]) or 'a trial is running'}); wait for them, or stop them, then start again"
            )
        return _continued(study, held, {**(fingerprint or {}), "space": now})


def _space_of(study: Study, otherwise: Space) -> Space:
    """The space that a study was signed with."""
    space: Space = study.user_attrs.get(FINGERPRINT_ATTRIBUTE, {}).get("space", otherwise)
    return space


def _continued(study: Study, before: Space, fingerprint: Mapping[str, Any]) -> Study:
    """The study of the larger space with all trials of the smaller one. Under the lock."""
    now: Space = fingerprint["space"]
    name, storage = _next_name(study), storage_of(study)
    if name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)  # of one that was killed before it was whole
    larger = optuna.create_study(study_name=name, storage=storage, directions=study.directions)
    name_metrics(larger)
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    groups = study_groups(study)
    for trial in trials:
        larger.add_trial(widened(trial, moving(before, groups), moving(now, groups)))
    for key, value in study.user_attrs.items():
        if key not in (ASKED, CONTINUES, FINGERPRINT_ATTRIBUTE):
            larger.set_user_attr(key, value)
    larger.set_user_attr(CONTINUES, study.study_name)
    if FINGERPRINT_ATTRIBUTE in study.user_attrs:
        larger.set_user_attr(FINGERPRINT_ATTRIBUTE, grown(study.user_attrs[FINGERPRINT_ATTRIBUTE], fingerprint))
    added = sorted(larger.get_trials(deepcopy=False), key=lambda trial: trial.number)
    if [(trial.number, trial.state) for trial in added] != [(trial.number, trial.state) for trial in trials]:
        raise StudyError(f"{study.study_name}: trials changed while they were taken over; start again")
    study.set_user_attr(MOVED, name)
    return larger


def _next_name(study: Study) -> str:
    """`NAME` → `NAME, space 2` → `NAME, space 3`."""
    base, found, number = study.study_name.rpartition(", space ")
    return f"{base}, space {int(number) + 1}" if found and number.isdecimal() else f"{study.study_name}, space 2"


def widened(trial: FrozenTrial, before: Space, now: Space) -> FrozenTrial:
    """A trial as one of the larger space; components that had no choice stand where they stood. A group is one.

    A trial that was killed before its map was complete stays so.
    """
    choices: Choices = {name: tuple(held) for name, held in now.items() if len(held) > 1}
    chosen, moved = map_of(trial), copy.deepcopy(trial)
    if chosen.keys() == {name for name, held in before.items() if len(held) > 1}:
        chosen = {name: chosen.get(name, before[name][0]) for name in choices}
    moved.params = chosen
    moved.distributions = {name: CategoricalDistribution(choices[name]) for name in chosen}
    moved.system_attrs = {key: value for key, value in trial.system_attrs.items() if key != "fixed_params"}
    return moved


def _keep_probes(run: RunDirectory, fingerprint: Mapping[str, Any], before: Space) -> str:
    """Mark the probes as of the larger space whose end stands where it stood; says how many of how many."""
    now: Space = fingerprint["space"]
    same = {
        name for name, at in ((WIDEST, 0), (LOWEST, -1))
        if {c: held[at] for c, held in before.items()} == {c: held[at] for c, held in now.items()}
    }  # fmt: skip
    mark, old = mark_of(fingerprint), mark_of(of_space(fingerprint, before))
    lines = run.read_lines(PROBES)
    measured = [line["probe"] for line in lines if line["fingerprint"] == old]
    marked = {_key(line["probe"]) for line in lines if line["fingerprint"] == mark}
    kept = [probe for probe in measured if probe["end"] in same]
    run.append_lines(PROBES, [{"fingerprint": mark, "probe": probe} for probe in kept if _key(probe) not in marked])
    return f"{len(kept)} of {len(measured)}"


def _key(probe: Mapping[str, str]) -> tuple[str, str, str]:
    return probe["end"], probe["component"], probe["precision"]


def _told(before: Space, now: Space) -> str:
    """What has been added, in a few words."""
    added = [f"{name}: + {', '.join(p for p in now[name] if p not in held)}" for name, held in before.items()
             if set(now[name]) - set(held)]  # fmt: skip
    return "; ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
