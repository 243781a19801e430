"""The loop of a worker: claim a trial, evaluate it, tell, until the study has the number of trials asked for.

Any number of workers may run it at once, on one machine or many, and come, go and be killed at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from optuna.trial import Trial

from search.base.stop import Stop, WorkInterruptedError
from search.measure.objective import Measured
from search.problem.run_directory import RunDirectory
from search.problem.spec import SAMPLERS
from search.run.claim import Choices, Idle, claim, give_back, take_over, tell
from search.trials.attributes import ORIGIN
from search.trials.maps import map_of
from search.trials.optuna_storage import stored, trial_id
from search.trials.owner import LEASES, Owner, dead_owners
from search.trials.read_back import rivals_of
from search.trials.storage import OpenStudy
from ssm_mp.errors import EvaluationError, InfeasibleError

Ending = Literal["finished", "exhausted", "stopped"]
"""Why a worker ended: the study is finished, all maps were tried, or a signal asked it to."""

_MOST_FAILURES_IN_A_ROW = 20
_LOOK_EVERY = 1.0
"""Seconds between two looks of a worker that has nothing to do but wait for others."""
_SEARCH_EVERY = 5.0
"""Seconds between two searches for dead workers; one waiting worker at a time asks the queue."""


@dataclass(frozen=True, eq=False)
class Task:
    """One trial to evaluate: the free components' precisions, and the maps that it races against.

    rivals: bytes and log-increases of maps with all windows; no one for a seed: what becomes of it must not depend on
    what other workers have finished by then.
    """

    params: dict[str, str]
    rivals: list[tuple[int, np.ndarray]]


Evaluate = Callable[[Task], Measured]


@dataclass(frozen=True, eq=False)
class Together:
    """How a worker evaluates several trials in one pass, `most` of them; what is wrong with one stands in its place."""

    most: int
    evaluate: Callable[[Sequence[Task]], Sequence[Measured | EvaluationError | InfeasibleError]]


@dataclass(frozen=True, eq=False)
class Worker:
    """One worker of a study. `after` is told, after each trial, whether it finished (or failed).

    together: how several trials are evaluated at once; None where each is evaluated for itself.
    """

    opened: OpenStudy
    run: RunDirectory
    space: Choices
    owner: Owner
    asked: int
    budget_percent: float
    sampler: str
    evaluate: Evaluate
    after: Callable[[bool], None]
    say: Callable[[str], None]
    stop: Stop
    together: Together | None = None

    def work(self) -> Ending:
        """Evaluate trials until the study has as many as asked for; raises EvaluationError where everything fails."""
        take_over_lost(self.opened, self.run, self.space, self.say)
        failures, searched, told = 0, time.monotonic(), False
        while not self.stop:
            claimed = self._claimed()
            if not isinstance(claimed, Idle):
                for failure in self._evaluated(claimed):
                    failures = failures + 1 if failure else 0
                    if failures >= _MOST_FAILURES_IN_A_ROW:
                        raise EvaluationError(f"the last {failures} trials all failed: {failure}")
                continue
            if claimed is not Idle.wait:
                return "finished" if claimed is Idle.finished else "exhausted"
            if not told:
                self.say("the last trials are being evaluated by other workers; waiting for them")
                told = True
            if time.monotonic() - searched >= _SEARCH_EVERY:
                take_over_lost(self.opened, self.run, self.space, self.say)
                searched = time.monotonic()
            self.stop.sleep(_LOOK_EVERY)
        return "stopped"

    def _claimed(self) -> list[Trial] | Idle:
        """The next trials to evaluate at once, as many as there are and this worker takes; why there is none."""
        trials: list[Trial] = []
        most = 1 if self.together is None else self.together.most
        while len(trials) < most and not (trials and self.stop):
            held = {trial_id(trial) for trial in trials}
            claimed = partial(claim, self.opened, self.space, self.owner, self.asked, self.sampler, held)
            found = self.opened.patiently(claimed)
            if isinstance(found, Idle):
                return trials or found
            trials.append(found)
        return trials

    def _evaluated(self, trials: Sequence[Trial]) -> list[str | None]:
        """Evaluate trials and tell the study; why each failed, None where it did not."""
        began = time.monotonic()
        try:
            outcomes = self._outcomes([self._task(trial) for trial in trials])
        except WorkInterruptedError as interrupted:
            reason = f"given back on {interrupted}, and tried again"
            for trial in trials:
                self.opened.patiently(partial(give_back, self.opened, trial, self.space, reason))
            return []
        spent = (time.monotonic() - began) / len(trials)
        return [self._told(trial, outcome, spent) for trial, outcome in zip(trials, outcomes, strict=True)]

    def _task(self, trial: Trial) -> Task:
        """A claimed trial's map and rivals."""
        opened = self.opened
        frozen = opened.patiently(lambda: stored(opened.study, trial))
        seeded = frozen.user_attrs.get(ORIGIN) not in SAMPLERS
        return Task(map_of(frozen), [] if seeded else opened.patiently(lambda: rivals_of(opened, map_of(frozen))))

    def _outcomes(self, tasks: Sequence[Task]) -> list[Measured | str]:
        """What each task measured, or why it failed."""
        if self.together is not None and len(tasks) > 1:
            found = self.together.evaluate(tasks)
            return [outcome if isinstance(outcome, Measured) else str(outcome) for outcome in found]
        try:
            return [self.evaluate(task) for task in tasks]  # a single one
        except (EvaluationError, InfeasibleError) as error:
            return [str(error)]

    def _told(self, trial: Trial, outcome: Measured | str, spent: float) -> str | None:
        """Tell the study what became of one trial, which took `spent` seconds; why it failed, None where it did not."""
        opened = self.opened
        if not opened.patiently(lambda: tell(opened, trial, outcome, self.budget_percent, spent)):
            self.say(f"trial {trial.number} was taken over by another worker meanwhile; its result is not used")
            return None
        self.after(isinstance(outcome, Measured))
        return outcome if isinstance(outcome, str) else None


def take_over_lost(opened: OpenStudy, run: RunDirectory, space: Choices, say: Callable[[str], None]) -> int:
    """Queue the trials of dead workers again; returns how many. One process at a time looks for them."""

    def dead(owners: set[Owner]) -> set[Owner]:
        return dead_owners(owners, run / LEASES)

    with run.lock("watch").tried() as watching:
        lost = opened.patiently(lambda: take_over(opened, space, dead)) if watching else 0
    if lost:
        say(f"{lost} interrupted trial{'s' if lost > 1 else ''} will be tried again")
    return lost
