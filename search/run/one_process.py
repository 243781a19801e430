"""A whole search in one process, and the end of one that many workers have run."""

from __future__ import annotations

from search.base.stop import Stop
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec
from search.results.report import Result
from search.run.finish import finish
from search.run.one_worker import asked_of, open_prepared, work_on
from search.run.prepare import Prepared, Say, prepare
from search.run.study import is_exhausted
from search.run.worker_loop import take_over_lost
from search.trials.owner import this_process
from search.trials.read_back import counts
from search.trials.storage import choose_storage, require_reachable


def run_search(spec: StudySpec, run: RunDirectory, say: Say) -> Result:
    """Run or continue a study to its number of trials, then finish it: everything in the run directory."""
    with run.owned():
        if spec.storage.kind == "postgresql":
            require_reachable(choose_storage(spec, run, many=False, say=say), run, say)
        prepared = prepare(spec, run, say)
        opened = open_prepared(spec, run, prepared, say, many=False)
        work_on(opened, spec, run, prepared, this_process(), say, Stop())
        return finish(opened.study, prepared, run, say)


def finish_study(spec: StudySpec, run: RunDirectory, say: Say) -> Result | None:
    """Finish a study that its workers have left; None, with no certificate spent, where trials are still missing."""
    with run.owned():
        return finish_prepared(spec, run, say)


def finish_prepared(spec: StudySpec, run: RunDirectory, say: Say, prepared: Prepared | None = None) -> Result | None:
    """The same for a process that holds the run directory already, and may have prepared the study."""
    prepared = prepared or prepare(spec, run, say)
    opened = open_prepared(spec, run, prepared, say, many=False)
    asked = asked_of(opened, spec, prepared)
    take_over_lost(opened, run, prepared.choices, say)
    found = counts(opened.study)
    if found.finished < asked and not is_exhausted(opened.study, prepared.choices):
        say(f"{found.finished} of {asked} trials are finished, {found.running} running, {found.waiting} queued")
        return None
    return finish(opened.study, prepared, run, say)
