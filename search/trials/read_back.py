"""The trials of a study read back: counts, points of the picture, log-increases. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.front import Point
from search.problem.groups import NO_GROUPS, Groups, expanded, groups_in
from search.problem.spec import StudySpec
from search.trials.attributes import DIFFERENCES, FINISHED, LATENCY, MEASURED, ORIGIN, REASON, unpacked
from search.trials.storage import OpenStudy

ASKED = "asked"
"""User attribute of a study: how many finished trials it is to have, and for which request."""


FINGERPRINT_ATTRIBUTE = "fingerprint"
"""User attribute of a study: what its results depend on."""

CONTINUES = "continues"
"""User attribute of a study: the name of the one in a smaller space that its first trials come from."""

PRECISION = "precision"
"""User attribute of a study: what its study file says of the space, to tell a changed one without loading a model."""


@dataclass(frozen=True)
class Counts:
    """Trials of a study by state. `finished` ones have a result; `stopped` of them had it before all windows."""

    finished: int
    stopped: int
    running: int
    failed: int
    waiting: int
    reasons: Mapping[str, int]


def counts(study: Study) -> Counts:
    """How many trials are in which state, and why trials failed."""
    trials = study.get_trials(deepcopy=False)
    count = Counter(trial.state for trial in trials)
    reasons = Counter(
        str(trial.user_attrs.get(REASON, "unknown")) for trial in trials if trial.state == TrialState.FAIL
    )
    return Counts(
        finished=sum(count[state] for state in FINISHED),
        stopped=count[TrialState.PRUNED],
        running=count[TrialState.RUNNING],
        failed=count[TrialState.FAIL],
        waiting=count[TrialState.WAITING],
        reasons=dict(reasons),
    )


def finished_differences(study: Study, slowest: float | None = None) -> list[tuple[int, np.ndarray]]:
    """Of all trials with all windows: bytes, and the log-increase of each window.

    slowest: leaves out those of a higher latency in seconds, where latency is an objective.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        (trial.user_attrs[MEASURED]["bytes"], unpacked(trial.user_attrs[DIFFERENCES]))
        for trial in complete
        if DIFFERENCES in trial.user_attrs and (slowest is None or trial.user_attrs[MEASURED][LATENCY] <= slowest)
    ]


def rivals_of(opened: OpenStudy, params: Mapping[str, str]) -> list[tuple[int, np.ndarray]]:
    """The maps that a map races against: those that could dominate it, which a slower one cannot."""
    return finished_differences(opened.study, None if opened.latency is None else opened.latency(params))


def points(study: Study, space: Mapping[str, Sequence[str]]) -> list[Point]:
    """All finished trials, by number; `space` is every component's choices, so that each point's map is total."""
    widest, groups = {name: choices[0] for name, choices in space.items()}, study_groups(study)
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return [point_of(trial, widest, groups) for trial in sorted(finished, key=lambda trial: trial.number)]


def study_groups(study: Study) -> Groups:
    """Which components move together in a study, as it was signed."""
    return groups_in(study.user_attrs.get(FINGERPRINT_ATTRIBUTE, {}))


def point_of(trial: FrozenTrial, widest: Mapping[str, str], groups: Groups = NO_GROUPS) -> Point:
    """A finished trial as a point; `widest` completes its map, in which groups are their members."""
    measured = trial.user_attrs[MEASURED]
    return Point(
        trial=trial.number,
        compression=measured["compression"] if "compression" in measured else trial.values[0],
        bytes=measured["bytes"],
        perplexity=measured["perplexity"],
        increase_percent=measured["increase_percent"],
        stderr_percent=measured["stderr_percent"],
        map={**widest, **expanded(trial.params, groups)},
        origin=trial.user_attrs.get(ORIGIN, ""),
        windows=measured["windows"],
        stopped=measured.get("stopped"),
        latency=measured.get(LATENCY),
    )


def is_finished(study: Study, spec: StudySpec) -> bool:
    """Whether a study certainly has what is asked of it, so that a worker that comes late need not load anything."""
    stored, asked = study.user_attrs.get(ASKED), spec.search
    if not stored or (stored["trials"], stored["budget_percent"]) != (asked.trials, asked.budget_percent):
        return False
    if study.user_attrs.get(PRECISION, precision_of(spec)) != precision_of(spec):
        return False  # its space may have grown
    return counts(study).finished >= int(stored["asked"])


def precision_of(spec: StudySpec) -> dict[str, list[str]]:
    """What a study file says of the space."""
    held = spec.precision
    together = {"group": [held.group, *held.groups]} if held.groups or held.group != "none" else {}
    return {"choices": list(held.choices), "pin": list(held.pin), "unpin": list(held.unpin), **together}


def asked_trials(study: Study, otherwise: int) -> int:
    """How many finished trials the study is to have, as its last search or launch said."""
    stored = study.user_attrs.get(ASKED)
    return int(stored["asked"]) if stored else otherwise
