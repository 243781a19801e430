"""The Optuna study of a run: open or resume it, enqueue the seeds, run trials, read the results back."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from search.front import Point
from search.front_sampler import FrontSampler
from search.knowledge import Knowledge
from search.measured import DIFFERENCES, FINISHED, MEASURED, ORIGIN, REASON, map_of, packed, unpacked
from search.objective import Measured
from search.run_directory import DATABASE, RunDirectory, require_same
from search.sampler import complete_maps, make_sampler, map_key, seen_maps
from search.spec import StudySpec
from ssm_mp.errors import EvaluationError, InfeasibleError, MachineError

_MOST_FAILURES_IN_A_ROW = 20
STUDY_NAME = "precision search"
"""One study a database, whatever its study file is called."""
FINGERPRINT_ATTRIBUTE = "fingerprint"


@dataclass(frozen=True)
class Seed:
    """A map that the study evaluates first: the free components' precisions, and where it comes from."""

    params: Mapping[str, str]
    origin: str


@dataclass(frozen=True)
class Status:
    """Trials of a study by state. `finished` ones have a result; `stopped` of them had it before all windows."""

    finished: int
    stopped: int
    running: int
    failed: int
    waiting: int
    reasons: Mapping[str, int]


def open_study(
    spec: StudySpec,
    run: RunDirectory,
    space: Mapping[str, tuple[str, ...]],
    fingerprint: Mapping[str, Any],
    knowledge: Knowledge | None = None,
) -> Study:
    """Create or load the study of a run; `space` is the free components' choices, `knowledge` for sampler `front`.

    Raises StudyError where the database holds a study of this name with another fingerprint.
    """
    distributions = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    study = load_study(run)
    current = json.loads(json.dumps(fingerprint))
    if FINGERPRINT_ATTRIBUTE in study.user_attrs:
        require_same(study.user_attrs[FINGERPRINT_ATTRIBUTE], current, f"{run.path} ({DATABASE})")
    else:
        study.set_user_attr(FINGERPRINT_ATTRIBUTE, current)
    # another seed for every continuation, or the sampler would propose the same maps again
    seed = (spec.search.seed + len(study.get_trials(deepcopy=False))) % 2**32
    study.sampler = make_sampler(spec.search.sampler, distributions, seed, knowledge, spec.search.budget_percent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["compression", "increase_percent"])
    return study


def load_study(run: RunDirectory) -> Study:
    """The study of a run as it stands, without a sampler; an empty one where no trial was made yet."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (run / DATABASE).resolve()
    try:
        return optuna.create_study(
            study_name=STUDY_NAME,
            storage=RDBStorage(f"sqlite:///{path}"),
            directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE],
            load_if_exists=True,
        )
    except (SQLAlchemyError, StorageInternalError) as error:
        raise MachineError(f"{path}: the database cannot be used ({str(error).splitlines()[0]})") from None


def recover(study: Study, space: Mapping[str, tuple[str, ...]]) -> int:
    """Put trials that a killed search left running back in the queue; returns how many. One process only.

    A trial that was killed before its map was complete (`space`: the free components) is given up, and its map
    with it: it was only a proposal.
    """
    complete = set(space)
    stale = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
    for trial in stale:
        if set(map_of(trial)) == complete:  # queued first: a second kill between the two steps must not lose it
            _queue(study, Seed(map_of(trial), trial.user_attrs.get(ORIGIN, "")), space)
        study._storage.set_trial_user_attr(trial._trial_id, REASON, "interrupted, and tried again")
        study.tell(trial.number, state=TrialState.FAIL)
    _drop_repeated(study)
    return len(stale)


def reconsider(study: Study, space: Mapping[str, tuple[str, ...]], budget_percent: float) -> int:
    """Queue the maps again that were stopped as over a budget lower than this one; returns how many."""
    trials = study.get_trials(deepcopy=False)
    known = {map_key(map_of(t)) for t in trials if t.state not in (TrialState.PRUNED, TrialState.FAIL)}
    queued = 0
    for trial in trials:
        measured = trial.user_attrs.get(MEASURED, {})
        over = trial.state == TrialState.PRUNED and measured.get("stopped") == "over budget"
        if over and measured.get("lower_percent", np.inf) <= budget_percent and map_key(map_of(trial)) not in known:
            _queue(study, Seed(map_of(trial), trial.user_attrs.get(ORIGIN, "")), space)
            known.add(map_key(map_of(trial)))
            queued += 1
    return queued


def _drop_repeated(study: Study) -> None:
    """Fail queued maps that are queued twice, as a kill in the middle of `recover` leaves them."""
    seen: set[str] = set()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        key = map_key(map_of(trial))
        if key in seen:
            study._storage.set_trial_user_attr(trial._trial_id, REASON, "queued twice")
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        seen.add(key)


def _queue(study: Study, seed: Seed, space: Mapping[str, tuple[str, ...]]) -> None:
    """Queue one map, all of its parameters in one operation of the storage."""
    template = _template(TrialState.WAITING, seed.params, space, seed.origin)
    study._storage.create_new_trial(study._study_id, template_trial=template)


def _template(
    state: TrialState, params: Mapping[str, str], space: Mapping[str, tuple[str, ...]], origin: str
) -> FrozenTrial:
    """A trial with its whole map, for the storage to write at once."""
    distributions: dict[str, Any] = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    return create_trial(state=state, params=dict(params), distributions=distributions, user_attrs={ORIGIN: origin})


def enqueue(study: Study, seeds: Iterable[Seed], space: Mapping[str, tuple[str, ...]]) -> int:
    """Queue the seeds that the study does not have yet; returns how many."""
    queued = 0
    seen = seen_maps(study)
    for seed in seeds:
        if map_key(seed.params) not in seen:
            _queue(study, seed, space)
            seen.add(map_key(seed.params))
            queued += 1
    return queued


def run_trials(
    study: Study,
    space: Mapping[str, tuple[str, ...]],
    evaluate: Callable[[Mapping[str, str]], Measured],
    *,
    trials: int,
    budget_percent: float,
    sampler: str,
    after: Callable[[bool], None],
) -> None:
    """Evaluate maps until the study has `trials` finished ones, or every map of the space has been tried.

    `after` is told, after each trial, whether it finished (or failed).
    """
    failures = 0
    while status(study).finished < trials:
        trial = claim(study, space, sampler)
        if trial is None:
            return
        finished = _run_one(study, trial, evaluate, budget_percent)
        failures = 0 if finished else failures + 1
        if failures >= _MOST_FAILURES_IN_A_ROW:
            raise EvaluationError(f"the last {failures} trials all failed: {trial.user_attrs.get(REASON)}")
        after(finished)


def claim(study: Study, space: Mapping[str, tuple[str, ...]], sampler: str) -> Trial | None:
    """The next trial to evaluate, running: a queued one, else a new proposal; None where every map has been tried."""
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
            trial = Trial(study, waiting._trial_id)
            for name, choices in space.items():  # a write only for a map that an older version queued
                trial.suggest_categorical(name, choices)
            return trial
    if isinstance(study.sampler, FrontSampler):
        params = study.sampler.propose(study)
        if params is None:
            return None
        template = _template(TrialState.RUNNING, params, space, sampler)
        return Trial(study, study._storage.create_new_trial(study._study_id, template_trial=template))
    if len(complete_maps(study, space)) >= prod(len(choices) for choices in space.values()):
        return None
    trial = study.ask(fixed_distributions={name: CategoricalDistribution(choices) for name, choices in space.items()})
    trial.set_user_attr(ORIGIN, sampler)
    return trial


def _run_one(
    study: Study, trial: Trial, evaluate: Callable[[Mapping[str, str]], Measured], budget_percent: float
) -> bool:
    """Evaluate one trial and tell the study whether it finished; one that cannot be evaluated fails with its reason."""
    began = time.monotonic()
    try:
        measured = evaluate(trial.params)
    except (EvaluationError, InfeasibleError) as error:
        trial.set_user_attr(REASON, str(error))
        study.tell(trial, state=TrialState.FAIL)
        return False
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
        "seconds": round(time.monotonic() - began, 3),
    }
    trial.set_user_attr(MEASURED, values)
    trial.set_constraint("budget", measured.increase.percent - budget_percent)
    if measured.stopped is not None:
        study.tell(trial, state=TrialState.PRUNED)
        return True
    trial.set_user_attr(DIFFERENCES, packed(measured.differences))
    study.tell(trial, [measured.compression, measured.increase.percent])
    return True


def finished_differences(study: Study) -> list[tuple[int, np.ndarray]]:
    """Of all trials with all windows: bytes, and the log-increase of each window."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        (trial.user_attrs[MEASURED]["bytes"], unpacked(trial.user_attrs[DIFFERENCES]))
        for trial in complete
        if DIFFERENCES in trial.user_attrs
    ]


def points(study: Study, space: Mapping[str, Sequence[str]]) -> list[Point]:
    """All finished trials, by number; `space` is every component's choices, so that each point's map is total."""
    widest = {name: choices[0] for name, choices in space.items()}
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return [_point(trial, widest) for trial in sorted(finished, key=lambda trial: trial.number)]


def _point(trial: FrozenTrial, widest: Mapping[str, str]) -> Point:
    measured = trial.user_attrs[MEASURED]
    return Point(
        trial=trial.number,
        compression=measured["compression"] if "compression" in measured else trial.values[0],
        bytes=measured["bytes"],
        perplexity=measured["perplexity"],
        increase_percent=measured["increase_percent"],
        stderr_percent=measured["stderr_percent"],
        map={**widest, **trial.params},
        origin=trial.user_attrs.get(ORIGIN, ""),
        windows=measured["windows"],
        stopped=measured.get("stopped"),
    )


def status(study: Study) -> Status:
    """How many trials are in which state, and why trials failed."""
    trials = study.get_trials(deepcopy=False)
    count = Counter(trial.state for trial in trials)
    reasons = Counter(
        str(trial.user_attrs.get(REASON, "unknown")) for trial in trials if trial.state == TrialState.FAIL
    )
    return Status(
        finished=sum(count[state] for state in FINISHED),
        stopped=count[TrialState.PRUNED],
        running=count[TrialState.RUNNING],
        failed=count[TrialState.FAIL],
        waiting=count[TrialState.WAITING],
        reasons=dict(reasons),
    )


def prediction_error(knowledge: Knowledge, study: Study) -> float | None:
    """Root mean square of what the surrogate misses each finished map by, predicted from all the others.

    In log-perplexity; maps that were probed as well are left out. None below three finished trials.
    """
    catalogue = knowledge.catalogue
    probed = {row.tobytes() for row in knowledge.choices}
    every = study.get_trials(deepcopy=False, states=FINISHED)
    finished = [trial for trial in every if catalogue.encode(map_of(trial)).tobytes() not in probed]
    if len(finished) < 3:
        return None
    missed = FrontSampler(knowledge, 1.0, 0).posterior(finished).leave_one_out()[-len(finished) :]
    return float(np.sqrt(np.mean(missed**2)))
