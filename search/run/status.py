"""How a search stands: counts, who works on what, rate, time left, best so far, hypervolume over time.

Reads the run directory and its trials, and the queue where there is one. Needs no torch and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.front import Point, hypervolume, pareto_front
from search.base.metric import PERPLEXITY, Metric
from search.problem.groups import Groups
from search.slurm.queue import QueuedTask
from search.trials.attributes import FINISHED, OWNER
from search.trials.read_back import asked_trials, counts, point_of, study_groups

_RECENT = 20
"""Trials that the rate is taken from: the last so many, so that it follows workers that come and go."""


@dataclass(frozen=True)
class Running:
    """One trial that is being evaluated: by whom, on which machine, for how many seconds."""

    trial: int
    worker: str
    node: str
    seconds: float


@dataclass(frozen=True)
class Growth:
    """The hypervolume of the front when a trial finished, that many seconds after the first trial began."""

    seconds: float
    finished: int
    hypervolume: float


@dataclass(frozen=True)
class Standing:
    """A search at one moment. Rates are finished trials an hour; `seconds_left` None where none can be told."""

    asked: int
    finished: int
    stopped: int
    failed: int
    waiting: int
    running: tuple[Running, ...]
    reasons: Mapping[str, int]
    trials_per_hour: float | None
    seconds_left: float | None
    best: Point | None
    metric: Metric
    growth: tuple[Growth, ...]
    jobs: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """As the command line answers."""
        best = None if self.best is None else self.best.to_json(self.metric)
        found = {**asdict(self), "running": [asdict(one) for one in self.running], "best": best}
        del found["metric"]
        return found if self.metric is PERPLEXITY else {**found, "metric": self.metric.word}


def standing(
    study: Study,
    space: Mapping[str, Sequence[str]],
    trials: int,
    budget_percent: float,
    now: datetime,
    jobs: Mapping[str, Mapping[str, int]] | None = None,
    metric: Metric = PERPLEXITY,
) -> Standing:
    """How a study stands. `trials` and `budget_percent`: the study file's; `jobs`: what the queue says of each step."""
    every = study.get_trials(deepcopy=False)
    found = counts(study)
    widest, groups = {name: choices[0] for name, choices in space.items()}, study_groups(study)
    finished = _in_order(every)
    front = pareto_front([point_of(trial, widest, groups) for trial in finished], budget_percent)
    asked = asked_trials(study, trials)
    rate = _rate(finished)
    missing = max(0, asked - found.finished)
    return Standing(
        asked=asked,
        finished=found.finished,
        stopped=found.stopped,
        failed=found.failed,
        waiting=found.waiting,
        running=tuple(_running(t, now) for t in every if t.state == TrialState.RUNNING),
        reasons=dict(Counter(found.reasons).most_common()),
        trials_per_hour=None if rate is None else 3600 * rate,
        seconds_left=0.0 if not missing else None if not rate else missing / rate,
        best=front[0] if front else None,
        metric=metric,
        growth=tuple(growth(finished, widest, budget_percent, groups, metric)),
        jobs=jobs or {},
    )


def empty_standing(trials: int, jobs: Mapping[str, Mapping[str, int]]) -> Standing:
    """A search that was launched and has no trial yet."""
    return Standing(trials, 0, 0, 0, 0, (), {}, None, None, None, PERPLEXITY, (), jobs)


def growth_of(
    study: Study, space: Mapping[str, Sequence[str]], budget_percent: float, metric: Metric = PERPLEXITY
) -> list[Growth]:
    """The growth of a study's hypervolume; `space` is every component's choices."""
    widest = {name: choices[0] for name, choices in space.items()}
    finished = _in_order(study.get_trials(deepcopy=False, states=FINISHED))
    return growth(finished, widest, budget_percent, study_groups(study), metric)


def growth(
    finished: Sequence[FrozenTrial],
    widest: Mapping[str, str],
    budget_percent: float,
    groups: Groups,
    metric: Metric = PERPLEXITY,
) -> list[Growth]:
    """The hypervolume after each finished trial that changed it, trials in the order in which they were finished."""
    started = [trial.datetime_start for trial in finished if trial.datetime_start is not None]
    if not started:
        return []
    front: list[Point] = []
    grown: list[Growth] = []
    for number, trial in enumerate(finished, start=1):
        front = pareto_front([*front, point_of(trial, widest, groups)], budget_percent)
        area = hypervolume(front, budget_percent, metric=metric)
        if not grown or area != grown[-1].hypervolume:
            grown.append(Growth((_completed(trial) - min(started)).total_seconds(), number, area))
    return grown


def queued_jobs(steps: Mapping[str, str], states: Mapping[str, QueuedTask]) -> dict[str, dict[str, int]]:
    """How many tasks of each launched step (name → job id) are in which state of the queue."""
    found: dict[str, dict[str, int]] = {}
    for step, job in steps.items():
        held = [task.state for name, task in states.items() if name == job or name.startswith(f"{job}_")]
        found[step] = {state: held.count(state) for state in sorted(set(held))}
    return found


def _in_order(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The finished ones, as they were finished."""
    return sorted((trial for trial in trials if trial.state in FINISHED), key=_completed)


def _completed(trial: FrozenTrial) -> datetime:
    return trial.datetime_complete or datetime.max


def _rate(finished: Sequence[FrozenTrial]) -> float | None:
    """Finished trials a second, of the last ones; None below two."""
    recent = [_completed(trial) for trial in finished[-_RECENT:]]
    if len(recent) < 2 or recent[-1] == recent[0]:
        return None
    return (len(recent) - 1) / (recent[-1] - recent[0]).total_seconds()


def _running(trial: FrozenTrial, now: datetime) -> Running:
    owner = trial.user_attrs.get(OWNER, {})
    began = trial.datetime_start
    return Running(
        trial=trial.number,
        worker=owner.get("job") or f"process {owner.get('pid', '?')}",
        node=owner.get("node", "?"),
        seconds=0.0 if began is None else max(0.0, (now - began).total_seconds()),
    )
