"""A whole search, in one process or as one of many workers."""

from __future__ import annotations

from collections.abc import Callable

from search.finish import finish
from search.front import pareto_front
from search.objective import Measured, Objective
from search.owner import LEASES, Owner, lease, this_process
from search.prepare import Prepared, Say, prepare, seeds
from search.progress import Progress
from search.report import Result
from search.run_directory import CERTIFICATE, RunDirectory
from search.spec import StudySpec
from search.stop import Stop
from search.storage import OpenStudy, choose_storage, require_reachable
from search.study import begin, is_exhausted, open_study
from search.trials import counts, points
from search.worker import Ending, Task, Worker, take_over_lost


def run_search(spec: StudySpec, run: RunDirectory, say: Say) -> Result:
    """Run or continue a study to its number of trials, then finish it: everything in the run directory."""
    with run.owned():
        if spec.storage.kind == "postgresql":
            require_reachable(choose_storage(spec, run, many=False, say=say), run, say)
        prepared = prepare(spec, run, say)
        opened = _opened(spec, run, prepared, say, many=False)
        _work(opened, spec, run, prepared, this_process(), say, Stop())
        return finish(opened.study, prepared, run, say)


def run_worker(spec: StudySpec, run: RunDirectory, say: Say, stop: Stop) -> Ending:
    """Prepare the study together with the other workers, then evaluate trials until it has as many as asked for.

    Raises WorkInterruptedError where a signal comes before the first trial.
    """
    owner = this_process()
    prepared = prepare(spec, run, say, stop)
    opened = _opened(spec, run, prepared, say, many=True, worker=owner.name)
    return _work(opened, spec, run, prepared, owner, say, stop)


def finish_study(spec: StudySpec, run: RunDirectory, say: Say) -> Result | None:
    """Finish a study that its workers have left; None, with no certificate spent, where trials are still missing."""
    with run.owned():
        return finish_prepared(spec, run, say)


def finish_prepared(spec: StudySpec, run: RunDirectory, say: Say, prepared: Prepared | None = None) -> Result | None:
    """The same for a process that holds the run directory already, and may have prepared the study."""
    prepared = prepared or prepare(spec, run, say)
    opened = _opened(spec, run, prepared, say, many=False)
    asked = _asked(opened, spec, prepared)
    take_over_lost(opened, run, prepared.choices, say)
    found = counts(opened.study)
    if found.finished < asked and not is_exhausted(opened.study, prepared.choices):
        say(f"{found.finished} of {asked} trials are finished, {found.running} running, {found.waiting} queued")
        return None
    return finish(opened.study, prepared, run, say)


def _opened(
    spec: StudySpec, run: RunDirectory, prepared: Prepared, say: Say, *, many: bool, worker: str = ""
) -> OpenStudy:
    fingerprint = prepared.workspace.fingerprint()
    return open_study(
        spec, run, prepared.choices, fingerprint, prepared.knowledge, worker=worker, many=many, say=say
    )  # fmt: skip


def _asked(opened: OpenStudy, spec: StudySpec, prepared: Prepared) -> int:
    """Queue what comes first, and say how many trials the study is to have."""
    first = seeds(prepared)
    return opened.patiently(
        lambda: begin(opened, first, prepared.choices, spec.search.trials, spec.search.budget_percent)
    )


def _work(
    opened: OpenStudy, spec: StudySpec, run: RunDirectory, prepared: Prepared, owner: Owner, say: Say, stop: Stop
) -> Ending:
    with lease(run / LEASES, owner):
        asked = _asked(opened, spec, prepared)
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


def _show(progress: Progress, opened: OpenStudy, prepared: Prepared, spec: StudySpec) -> None:
    """The number of finished trials, whoever finished them, and the smallest map within the budget."""
    found = opened.patiently(lambda: points(opened.study, prepared.workspace.space.choices))
    front = pareto_front(found, spec.search.budget_percent)
    best = f"best {front[0].compression:.2f}× at {front[0].increase_percent:+.2f} %" if front else "none within budget"
    progress.show(len(found), best)
