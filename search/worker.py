"""The loop of a worker: claim a trial, evaluate it, tell, until the study has the number of trials asked for.

Any number of workers may run it at once, on one machine or many, and come, go and be killed at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from optuna.trial import Trial

from search.claim import Choices, Idle, claim, give_back, take_over, tell
from search.measured import ORIGIN, map_of
from search.objective import Measured
from search.owner import LEASES, Owner, dead_owners
from search.run_directory import RunDirectory
from search.spec import SAMPLERS
from search.stop import Stop, WorkInterruptedError
from search.storage import OpenStudy
from search.trials import finished_differences
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
class Worker:
    """One worker of a study. `after` is told, after each trial, whether it finished (or failed)."""

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

    def work(self) -> Ending:
        """Evaluate trials until the study has as many as asked for; raises EvaluationError where everything fails."""
        take_over_lost(self.opened, self.run, self.space, self.say)
        failures, searched, told = 0, time.monotonic(), False
        while not self.stop:
            claimed = self.opened.patiently(
                lambda: claim(self.opened, self.space, self.owner, self.asked, self.sampler)
            )
            if isinstance(claimed, Trial):
                failure = self._evaluated(claimed)
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

    def _evaluated(self, trial: Trial) -> str | None:
        """Evaluate one trial and tell the study; why it failed, None where it did not."""
        opened, began = self.opened, time.monotonic()
        frozen = opened.patiently(lambda: opened.study._storage.get_trial(trial._trial_id))
        seeded = frozen.user_attrs.get(ORIGIN) not in SAMPLERS
        rivals = [] if seeded else opened.patiently(lambda: finished_differences(opened.study))
        outcome: Measured | str
        try:
            outcome = self.evaluate(Task(map_of(frozen), rivals))
        except (EvaluationError, InfeasibleError) as error:
            outcome = str(error)
        except WorkInterruptedError as interrupted:
            reason = f"given back on {interrupted}, and tried again"
            opened.patiently(lambda: give_back(opened, trial, self.space, reason))
            return None
        spent = time.monotonic() - began
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
