"""Several workers on one machine: processes of their own, with the parent showing how far they are."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from search.base.command import COMMAND
from search.base.front import pareto_front
from search.base.progress import Progress
from search.base.stop import Stop
from search.problem.memory import SHARE
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec
from search.results.report import Result
from search.run.one_process import finish_prepared
from search.run.prepare import Say, prepare_alone
from search.trials.read_back import asked_trials, counts, points
from search.trials.storage import choose_storage, connect, require_reachable
from ssm_mp.evaluation.memory import memory_limit

LOGS = "logs"
"""Folder of workers' logs in a run directory."""
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0


def run_local(spec: StudySpec, run: RunDirectory, arguments: Sequence[str], workers: int, say: Say) -> Result | None:
    """Prepare, let `workers` processes run the trials, finish; None where they left before all were finished.

    arguments: those of `ssm-mp worker` for this study. A worker that dies is replaced by the others.
    """
    with run.owned():
        require_reachable(choose_storage(spec, run, many=True, say=say), run, say)
        with _memory_shared(1 + workers):  # this process keeps what it has prepared
            prepared = prepare_alone(spec, run, say, Stop())
            _work(spec, run, arguments, workers, say)
        return finish_prepared(spec, run, say, prepared)


def _work(spec: StudySpec, run: RunDirectory, arguments: Sequence[str], workers: int, say: Say) -> None:
    """Start the workers, and wait until all of them have ended."""
    (run / LOGS).mkdir(exist_ok=True)
    say(f"{workers} workers; their logs are in {run / LOGS}")
    processes = [_start(arguments, run / LOGS / f"worker-{number}.log", workers) for number in range(workers)]
    try:
        _watch(spec, run, processes, say)
    except KeyboardInterrupt:
        _end(processes)
        raise
    for number, process in enumerate(processes):
        if process.returncode != 0:
            say(f"worker {number} ended with code {process.returncode}: {run / LOGS / f'worker-{number}.log'}")


@contextmanager
def _memory_shared(processes: int) -> Iterator[None]:
    """While it lasts, this process and those that it starts plan for an equal share of memory each."""
    limit, former = memory_limit(), os.environ.get(SHARE)
    if limit is None or former is not None:
        yield
        return
    os.environ[SHARE] = str(limit.bytes // processes)
    try:
        yield
    finally:
        del os.environ[SHARE]


def _start(arguments: Sequence[str], log: Path, workers: int) -> subprocess.Popen[bytes]:
    """One worker, with its share of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    with log.open("ab") as file:
        return subprocess.Popen([*COMMAND, "worker", *arguments], stdout=file, stderr=file, env=environment)


def _watch(spec: StudySpec, run: RunDirectory, processes: Sequence[subprocess.Popen[bytes]], say: Say) -> None:
    """Show progress until all workers have ended."""
    opened = connect(choose_storage(spec, run, many=True, say=say), run, say)
    progress: Progress | None = None
    shown = -1
    while None in [process.poll() for process in processes]:
        found = opened.patiently(lambda: counts(opened.study))
        if found.finished != shown:
            front = pareto_front(points(opened.study, run.space()), spec.search.budget_percent)
            best = (
                f"best {front[0].compression:.2f}× at {spec.search.judged.said(front[0].increase_percent, 2)}"
                if front
                else ""
            )
            progress = progress or Progress("trials", asked_trials(opened.study, spec.search.trials), found.finished)
            progress.show(found.finished, best)
            shown = found.finished
        time.sleep(_POLL_SECONDS)
    if progress is not None:
        progress.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask workers to give their trials back and leave; kill those that do not."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
