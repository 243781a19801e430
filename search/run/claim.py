"""Who evaluates what: trials are claimed, told, given back and taken over under one lock of the study.

A trial is written whole, with its owner, in one operation. Whatever kills a worker between two operations, the next
to hold the lock finds a state that it can mend: a running trial whose owner is gone becomes a failed one, and its map
is queued again, ahead of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search.measure.objective import Measured
from search.sampling.sampler import proposer
from search.trials.attributes import (
    ATTEMPT,
    DIFFERENCES,
    FINISHED,
    FIRST,
    LATENCY,
    MEASURED,
    ORIGIN,
    OWNER,
    REASON,
    REOPENED,
    packed,
)
from search.trials.maps import map_key, map_of, seen_maps
from search.trials.optuna_storage import annotate, change_state, create, handle, stored, trial_id
from search.trials.owner import Owner, owner_from_json
from search.trials.storage import OpenStudy

Choices = Mapping[str, tuple[str, ...]]
"""The free components' precisions."""

LOST = "interrupted, and tried again"
"""Reason of a trial whose worker is gone."""

_MOST_ATTEMPTS = 10
"""A map that was interrupted so often is given up: it may be what kills its workers, or take longer than they live."""


class Idle(Enum):
    """Why there is no trial to claim: others evaluate the last ones, all are finished, or all maps were tried."""

    wait = "wait"
    finished = "finished"
    exhausted = "exhausted"


@dataclass(frozen=True)
class Seed:
    """A map that the study evaluates first: the free components' precisions, and where it comes from."""

    params: Mapping[str, str]
    origin: str


def enqueue(study: Study, seeds: Iterable[Seed], space: Choices) -> int:
    """Queue the seeds that the study does not have yet; returns how many. Under the study's lock."""
    queued = 0
    seen = seen_maps(study)
    for seed in seeds:
        if map_key(seed.params) not in seen:
            queue(study, seed, space)
            seen.add(map_key(seed.params))
            queued += 1
    return queued


def queue(study: Study, seed: Seed, space: Choices, attributes: Mapping[str, Any] | None = None) -> None:
    """Queue one map, all of its parameters in one operation of the storage."""
    template = _template(TrialState.WAITING, seed.params, space, {ORIGIN: seed.origin, **(attributes or {})})
    create(study, template)


def _template(
    state: TrialState,
    params: Mapping[str, str],
    space: Choices,
    user: Mapping[str, Any],
    system: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """A trial with its whole map, for the storage to write at once."""
    distributions: dict[str, Any] = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    return create_trial(
        state=state, params=dict(params), distributions=distributions, user_attrs=dict(user),
        system_attrs=dict(system or {}),
    )  # fmt: skip


def claim(
    opened: OpenStudy, space: Choices, owner: Owner, asked: int, sampler: str, held: Collection[int] = ()
) -> Trial | Idle:
    """The next trial for `owner` to evaluate: a queued one, else a new proposal. Never more than `asked` in all.

    held: ids of the trials that it has claimed already and evaluates together with this one.
    May be repeated after a failure of the database: a trial that was claimed before its answer was lost is found.
    """
    study = opened.study
    while True:
        with opened.locked():
            found = _queued(study, space, owner, asked, held)
        if found is not None:
            return found
        source = proposer(study)
        proposal = source.propose(study)  # takes a while, so outside of the lock
        with opened.locked():
            trials = study.get_trials(deepcopy=False)
            if proposal is None:
                busy = any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials)
                return Idle.wait if busy else Idle.exhausted
            if _room(trials, asked) <= 0 or any(map_of(trial) == proposal.params for trial in trials):
                source.forget(proposal)  # others were faster
                continue
            user = {ORIGIN: sampler, OWNER: owner.to_json()}
            template = _template(TrialState.RUNNING, proposal.params, space, user, proposal.attributes)
            return handle(study, create(study, template))


def _room(trials: Sequence[FrozenTrial], asked: int) -> int:
    """How many more trials may run."""
    return asked - sum(trial.state in FINISHED or trial.state == TrialState.RUNNING for trial in trials)


def _queued(study: Study, space: Choices, owner: Owner, asked: int, held: Collection[int]) -> Trial | Idle | None:
    """The next queued trial, now running; None where a new map must be proposed."""
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING and trial_id(trial) not in held]
    for mine in (trial for trial in running if _owner(trial) == owner):
        # its answer was lost, perhaps with the lock: then another may have been let in meanwhile
        if any(other.state != TrialState.WAITING for other in _same_map(trials, mine)):
            _put_back(study, mine, space, "claimed by another worker as well")
        elif _room(trials, asked) < 0:
            _put_back(study, mine, space, "claimed beyond the number asked for")
        else:
            return handle(study, trial_id(mine))
        return None
    if sum(trial.state in FINISHED for trial in trials) >= asked:
        return Idle.finished
    if _room(trials, asked) <= 0:
        return Idle.wait
    for waiting in sorted((trial for trial in trials if trial.state == TrialState.WAITING), key=_first):
        # two that queue at once, one of them without the lock, which a restarted server has let go
        states = {other.state for other in _same_map(trials, waiting)}
        if states.intersection(FINISHED):
            annotate(study, waiting, REASON, "queued twice")
            change_state(study, waiting, TrialState.FAIL)
        if states.intersection((*FINISHED, TrialState.RUNNING)):
            continue
        annotate(study, waiting, OWNER, owner.to_json())  # before anyone sees it run
        if change_state(study, waiting, TrialState.RUNNING):
            trial = handle(study, trial_id(waiting))
            for name, choices in space.items():  # a write only for a map that an older version queued
                trial.suggest_categorical(name, choices)
            return trial
    return None


def _first(trial: FrozenTrial) -> int:
    """Number of the trial that tried this map first: a map that was interrupted keeps its place in the queue."""
    return int(trial.user_attrs.get(FIRST, trial.number))


def _same_map(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[FrozenTrial]:
    """Other trials of a map, without failed ones and those that were stopped before a larger budget queued it again."""
    chosen, reopened = map_of(trial), trial.user_attrs.get(REOPENED, -1)
    return [
        other
        for other in trials
        if other.number != trial.number
        and other.state != TrialState.FAIL
        and not (other.state == TrialState.PRUNED and other.number <= reopened)
        and map_of(other) == chosen
    ]


def _owner(trial: FrozenTrial) -> Owner | None:
    """Who works on a trial; None for one of an older version."""
    values = trial.user_attrs.get(OWNER)
    return None if values is None else owner_from_json(values)


def tell(opened: OpenStudy, trial: Trial, measured: Measured | str, budget_percent: float, seconds: float) -> bool:
    """Write down what a trial measured, or why it failed; False where it was taken away meanwhile.

    May be repeated after a failure of the database.
    """
    study = opened.study
    with opened.locked():
        held = stored(study, trial)
        if held.state.is_finished():
            return held.state in FINISHED or isinstance(measured, str)
        try:
            with opened.together():
                if isinstance(measured, str):
                    trial.set_user_attr(REASON, measured)
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    latency = None if opened.latency is None else opened.latency(map_of(held))
                    _tell_measured(study, trial, measured, budget_percent, seconds, latency)
        except UpdateFinishedTrialError:
            return False
    return True


def _tell_measured(
    study: Study, trial: Trial, measured: Measured, budget_percent: float, seconds: float, latency: float | None
) -> None:
    values = {
        "bytes": measured.bytes,
        "perplexity": measured.perplexity,
        "increase_percent": measured.increase.percent,
        "stderr_percent": measured.increase.stderr_percent,
        "windows": measured.increase.windows,
        "of_windows": measured.of_windows,
        "lower_percent": measured.lower_percent,
        "stopped": measured.stopped,
        "compression": measured.compression,
        "seconds": round(seconds, 3),
        **({} if latency is None else {LATENCY: latency}),
    }
    trial.set_user_attr(MEASURED, values)
    trial.set_constraint("budget", measured.increase.percent - budget_percent)
    if measured.stopped is not None:
        study.tell(trial, state=TrialState.PRUNED)
        return
    trial.set_user_attr(DIFFERENCES, packed(measured.differences))
    known = [] if latency is None else [latency]
    study.tell(trial, [measured.compression, measured.increase.percent, *known])


def give_back(opened: OpenStudy, trial: Trial, space: Choices, reason: str) -> None:
    """Put an unfinished trial's map back in the queue."""
    with opened.locked():
        held = stored(opened.study, trial)
        if held.state == TrialState.RUNNING:
            _put_back(opened.study, held, space, reason)


def running_owners(study: Study) -> set[Owner | None]:
    """Owners of the trials that are running; None stands for trials of an older version."""
    return {_owner(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}


def take_over(opened: OpenStudy, space: Choices, dead: Callable[[set[Owner]], set[Owner]]) -> int:
    """Put the trials of workers that are gone back in the queue; returns how many.

    dead: those of some owners that are certainly gone; it is asked outside of the lock.
    """
    owners = running_owners(opened.study)
    if not owners:
        return 0
    gone: set[Owner | None] = {*dead({owner for owner in owners if owner is not None}), None}
    with opened.locked():
        running = opened.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        lost = [trial for trial in running if _owner(trial) in gone]
        for trial in lost:
            _put_back(opened.study, trial, space, LOST)
    return len(lost)


def _put_back(study: Study, trial: FrozenTrial, space: Choices, reason: str) -> None:
    """Fail a trial and queue its map again, once, whatever is interrupted between the two. Under the lock.

    A map that was not complete when its worker was killed is given up: it was only a proposal.
    """
    attempt = int(trial.user_attrs.get(ATTEMPT, 1))
    chosen = map_of(trial)
    elsewhere = _same_map(study.get_trials(deepcopy=False), trial)
    if attempt >= _MOST_ATTEMPTS:
        reason = f"interrupted {attempt} times, and given up"
    elif set(chosen) == set(space) and not elsewhere:
        again = Seed(chosen, trial.user_attrs.get(ORIGIN, ""))
        kept = {key: trial.user_attrs[key] for key in (REOPENED,) if key in trial.user_attrs}
        queue(study, again, space, {**kept, FIRST: _first(trial), ATTEMPT: attempt + 1})
    annotate(study, trial, REASON, reason)
    change_state(study, trial, TrialState.FAIL)
