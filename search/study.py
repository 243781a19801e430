"""The Optuna study of a run: open or resume it, enqueue the seeds, run trials, read the results back."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from search.errors import StudyError
from search.front import Point
from search.objective import Measured
from search.run_directory import DATABASE, RunDirectory
from search.sampler import make_sampler, map_key, seen_maps
from search.spec import StudySpec
from ssm_mp.errors import EvaluationError, InfeasibleError, MachineError

_MOST_FAILURES_IN_A_ROW = 20
MEASURED, ORIGIN, REASON = "measured", "origin", "reason"
"""Names of the user attributes that a trial carries."""


@dataclass(frozen=True)
class Seed:
    """A map that the study evaluates first: the free components' precisions, and where it comes from."""

    params: Mapping[str, str]
    origin: str


@dataclass(frozen=True)
class Status:
    """Trials of a study by state."""

    finished: int
    running: int
    failed: int
    waiting: int
    reasons: Mapping[str, int]


def open_study(spec: StudySpec, run: RunDirectory, space: Mapping[str, tuple[str, ...]]) -> Study:
    """Create or load the study of a run; `space` is the free components' choices."""
    distributions = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    storage = _storage(spec, run)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE],
        load_if_exists=True,
    )
    # another seed for every continuation, or the sampler would propose the same maps again
    study.sampler = make_sampler(
        spec.search.sampler, distributions, spec.search.seed + len(study.get_trials(deepcopy=False))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["compression", "increase_percent"])
    return study


def load_study(spec: StudySpec, run: RunDirectory) -> Study:
    """The study of a run as it stands. Raises StudyError where there is none."""
    if spec.storage.url is None and not (run / DATABASE).exists():
        raise StudyError(f"{run.path}: no trials yet; start a search with `ssm-mp search`")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=spec.name, storage=_storage(spec, run))
    except KeyError:
        raise StudyError(f"{run.path}: its database holds no study named {spec.name!r}") from None


def _storage(spec: StudySpec, run: RunDirectory) -> RDBStorage:
    url = spec.storage.url or f"sqlite:///{(run / DATABASE).resolve()}"
    Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        return RDBStorage(url)
    except SQLAlchemyError as error:
        raise MachineError(f"{url}: the database cannot be opened ({str(error).splitlines()[0]})") from None


def recover(study: Study) -> int:
    """Put trials that a killed search left running back in the queue; returns how many. One process only."""
    stale = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
    for trial in stale:
        study._storage.set_trial_user_attr(trial._trial_id, REASON, "interrupted, and tried again")
        study.tell(trial.number, state=TrialState.FAIL)
        params = trial.system_attrs.get("fixed_params") or trial.params
        if params:
            study.enqueue_trial(dict(params), user_attrs={ORIGIN: trial.user_attrs.get(ORIGIN, "")})
    return len(stale)


def enqueue(study: Study, seeds: Iterable[Seed]) -> int:
    """Queue the seeds that the study does not have yet; returns how many."""
    queued = 0
    seen = seen_maps(study)
    for seed in seeds:
        if map_key(seed.params) not in seen:
            study.enqueue_trial(dict(seed.params), user_attrs={ORIGIN: seed.origin})
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
    distributions: dict[str, Any] = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    maps = 1
    for choices in space.values():
        maps *= len(choices)
    failures = 0
    while status(study).finished < trials:
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and len(seen_maps(study)) >= maps:
            return
        trial = study.ask(fixed_distributions=distributions)
        if not trial.user_attrs.get(ORIGIN):
            trial.set_user_attr(ORIGIN, sampler)
        finished = _run_one(study, trial, evaluate, budget_percent)
        failures = 0 if finished else failures + 1
        if failures >= _MOST_FAILURES_IN_A_ROW:
            raise EvaluationError(f"the last {failures} trials all failed: {trial.user_attrs.get(REASON)}")
        after(finished)


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
        "seconds": round(time.monotonic() - began, 3),
    }
    trial.set_user_attr(MEASURED, values)
    trial.set_constraint("budget", measured.increase.percent - budget_percent)
    study.tell(trial, [measured.compression, measured.increase.percent])
    return True


def points(study: Study, space: Mapping[str, Sequence[str]]) -> list[Point]:
    """All finished trials, by number; `space` is every component's choices, so that each point's map is total."""
    widest = {name: choices[0] for name, choices in space.items()}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [_point(trial, widest) for trial in sorted(complete, key=lambda trial: trial.number)]


def _point(trial: FrozenTrial, widest: Mapping[str, str]) -> Point:
    measured = trial.user_attrs[MEASURED]
    return Point(
        trial=trial.number,
        compression=trial.values[0],
        bytes=measured["bytes"],
        perplexity=measured["perplexity"],
        increase_percent=measured["increase_percent"],
        stderr_percent=measured["stderr_percent"],
        map={**widest, **trial.params},
        origin=trial.user_attrs.get(ORIGIN, ""),
    )


def status(study: Study) -> Status:
    """How many trials are in which state, and why trials failed."""
    trials = study.get_trials(deepcopy=False)
    count = Counter(trial.state for trial in trials)
    reasons = Counter(
        str(trial.user_attrs.get(REASON, "unknown")) for trial in trials if trial.state == TrialState.FAIL
    )
    return Status(
        finished=count[TrialState.COMPLETE],
        running=count[TrialState.RUNNING],
        failed=count[TrialState.FAIL],
        waiting=count[TrialState.WAITING],
        reasons=dict(reasons),
    )
