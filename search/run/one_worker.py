"""One worker of a study, from its study file to its last trial. Loads nothing that only the end of a search needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from search.base.front import pareto_front
from search.base.progress import Progress
from search.base.stop import Stop
from search.measure.objective import Measured, Objective
from search.measure.stacking import Raced, StackedObjective, trials_at_once
from search.problem.run_directory import CERTIFICATE, RunDirectory
from search.problem.spec import StudySpec
from search.run.prepare import Prepared, Say, prepare, seeds
from search.run.study import begin, open_study
from search.run.worker_loop import Ending, Task, Together, Worker
from search.trials.owner import LEASES, Owner, lease, this_process
from search.trials.read_back import counts, points
from search.trials.storage import OpenStudy


def run_worker(spec: StudySpec, run: RunDirectory, say: Say, stop: Stop) -> Ending:
    """Prepare the study together with the other workers, then evaluate trials until it has as many as asked for.

    Raises WorkInterruptedError where a signal comes before the first trial.
    """
    owner = this_process()
    prepared = prepare(spec, run, say, stop)
    opened = open_prepared(spec, run, prepared, say, many=True, worker=owner.name)
    return work_on(opened, spec, run, prepared, owner, say, stop)


def open_prepared(
    spec: StudySpec, run: RunDirectory, prepared: Prepared, say: Say, *, many: bool, worker: str = ""
) -> OpenStudy:
    """The study of a run that has been prepared, with its sampler."""
    fingerprint, known = prepared.workspace.fingerprint(), (prepared.knowledge, prepared.latency)
    return open_study(
        spec, run, prepared.choices, fingerprint, *known, worker=worker, many=many, say=say
    )  # fmt: skip


def asked_of(opened: OpenStudy, spec: StudySpec, prepared: Prepared) -> int:
    """Queue what comes first, and say how many trials the study is to have."""
    first = seeds(prepared)
    return opened.patiently(
        lambda: begin(opened, first, prepared.choices, spec.search.trials, spec.search.budget_percent)
    )


def work_on(
    opened: OpenStudy, spec: StudySpec, run: RunDirectory, prepared: Prepared, owner: Owner, say: Say, stop: Stop
) -> Ending:
    """Evaluate trials as one worker, holding its lease."""
    with lease(run / LEASES, owner):
        asked = asked_of(opened, spec, prepared)
        finished = opened.patiently(lambda: counts(opened.study)).finished
        if finished < asked:
            (run / CERTIFICATE).unlink(missing_ok=True)  # of a front that is about to change
        progress = Progress("trials", asked, finished)
        worker = Worker(
            opened=opened,
            run=run,
            space=prepared.choices,
            owner=owner,
            asked=asked,
            budget_percent=spec.search.budget_percent,
            sampler=spec.search.sampler,
            evaluate=evaluation(spec, prepared, stop),
            after=lambda finished: _show(progress, opened, prepared, spec) if finished else None,
            say=say,
            stop=stop,
            together=together(spec, prepared, stop),
        )
        ending = worker.work()
        progress.close()
        return ending


def evaluation(spec: StudySpec, prepared: Prepared, stop: Stop) -> Callable[[Task], Measured]:
    """What a worker does with a task: really convert, really evaluate, in a race where the study says so."""
    objective = Objective(prepared.workspace, prepared.baseline, stop.check)
    space = prepared.workspace.space

    def evaluate(task: Task) -> Measured:
        if not spec.search.racing:
            return objective(space.map(task.params))
        return objective.race(space.map(task.params), task.rivals, spec.search.racing_error)

    return evaluate


def together(spec: StudySpec, prepared: Prepared, stop: Stop) -> Together | None:
    """How a worker evaluates several tasks in one pass, by `[search] stacked`; None where it takes one at a time."""
    most = trials_at_once(prepared.workspace)
    if most == 1:
        return None
    objective = StackedObjective(prepared.workspace, prepared.baseline, stop.check)
    space, error = prepared.workspace.space, spec.search.racing_error

    def evaluate(tasks: Sequence[Task]) -> list[Raced]:
        if not spec.search.racing:
            return objective.all_windows([space.map(task.params) for task in tasks])
        return objective.race_many([(space.map(task.params), task.rivals) for task in tasks], error)

    return Together(most, evaluate)


def _show(progress: Progress, opened: OpenStudy, prepared: Prepared, spec: StudySpec) -> None:
    """The number of finished trials, whoever finished them, and the smallest map within the budget."""
    found = opened.patiently(lambda: points(opened.study, prepared.workspace.space.choices))
    front = pareto_front(found, spec.search.budget_percent)
    best = (
        f"best {front[0].compression:.2f}× at {spec.search.judged.said(front[0].increase_percent, 2)}"
        if front
        else "none within budget"
    )
    progress.show(len(found), best)
