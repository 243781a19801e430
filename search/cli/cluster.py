"""The commands of `ssm-mp` for many workers: launch, prepare, worker, finish, status, proxy."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base.saying import is_terminal, say
from search.base.streams import write_out
from search.cli.options import (
    ForceBaseline,
    Json,
    Overrides,
    RunDir,
    StudyPath,
    Trials,
    overrides,
    passed_on,
    print_answer,
)

if TYPE_CHECKING:
    from search.base.stop import Stop
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import StudySpec
    from search.results.report import Result

_WATCH_SECONDS = 2.0
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def launch(
    study: StudyPath,
    workers: Annotated[int, typer.Option(min=1, help="Tasks of the worker array.")] = 8,
    trials: Trials = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and commands, submit nothing.")] = False,
    run_dir: RunDir = None,
    set_: Overrides = None,
    force: ForceBaseline = False,
    json_: Json = False,
) -> None:
    """Submit a search to Slurm: prepare, an array of workers, finish."""
    from search.cli.answers import launched
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import load_spec
    from search.run.launch import dry_run_text, idle_gpu_note, submit_study

    asked = overrides(set_, trials, force=force)
    spec = load_spec(study, asked)
    run = RunDirectory.of(spec, run_dir)
    arguments = passed_on(study, run_dir, asked)
    if note := idle_gpu_note(spec):
        say(note)
    if dry_run:
        write_out(dry_run_text(spec, run, arguments, workers) + "\n")
        return
    print_answer(submit_study(spec, run, arguments, workers, say), json_, launched)


def prepare(
    study: StudyPath, run_dir: RunDir = None, set_: Overrides = None, force: ForceBaseline = False
) -> None:  # fmt: skip
    """Measure baseline and probes before the workers begin; many probes are left to them."""
    from search.base.stop import Stop, WorkInterruptedError
    from search.run.launch import FAILED
    from search.run.prepare import prepare_alone
    from search.trials.storage import choose_storage, require_reachable
    from ssm_mp.errors import SsmMpError

    spec, run = _study(study, run_dir, set_, force)
    stop = Stop()
    with stop.listening(signal.SIGUSR1, signal.SIGTERM):
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            (run / FAILED).unlink(missing_ok=True)
            require_reachable(choose_storage(spec, run, many=True, say=say), run, say)
            prepare_alone(spec, run, say, stop)
        except SsmMpError as error:
            if error.exit_code == SsmMpError.exit_code:  # the user's mistake: no worker on another machine does better
                run.write_json(FAILED, {"error": str(error)})
            raise
        except WorkInterruptedError:
            _leave(stop)


def worker(
    study: StudyPath,
    run_dir: RunDir = None,
    set_: Overrides = None,
    force: ForceBaseline = False,
    finish_: Annotated[bool, typer.Option("--finish", help="Finish the study when its last trial is done.")] = False,
) -> None:
    """Evaluate trials beside other workers until the study has as many as asked for.

    Works in Slurm and outside of it. SIGUSR1 and SIGTERM make it give its trial back; on SIGUSR1 a Slurm task requeues
    itself.
    """
    from search.base.stop import Stop, WorkInterruptedError
    from search.run.launch import require_not_failed
    from search.trials.storage import choose_storage

    spec, run = _study(study, run_dir, set_, force)
    stop = Stop()
    with stop.listening(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        require_not_failed(run)
        choose_storage(spec, run, many=True, say=say)
        if _has_all_trials(spec, run):  # told before anything is loaded
            say("the study has all its trials already")
            return _finish_last(spec, run) if finish_ else None
        from search.run.one_worker import run_worker

        try:
            ending = run_worker(spec, run, say, stop)
        except WorkInterruptedError:
            ending = "stopped"
        if ending == "stopped":
            _leave(stop)
    say(f"the study is {ending}")
    return _finish_last(spec, run) if finish_ else None


def finish(
    study: StudyPath, run_dir: RunDir = None, set_: Overrides = None, force: ForceBaseline = False, json_: Json = False
) -> None:  # fmt: skip
    """Finish a study that its workers have left: front, certificate, winner, plots, report."""
    from search.run.launch import require_not_failed
    from search.run.one_process import finish_study

    spec, run = _study(study, run_dir, set_, force)
    require_not_failed(run)
    conclude(finish_study(spec, run, say), run, json_)


def status(
    study: StudyPath,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every two seconds, until it is over.")] = False,
    run_dir: RunDir = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Show how a search stands: trials, workers, rate, time left, best so far."""
    from search.cli.answers import stood

    spec, run = _study(study, run_dir, set_)
    while True:
        content = _standing(spec, run)
        if watch and not json_ and is_terminal(sys.stdout):
            write_out("\x1b[2J\x1b[H")  # clears the screen
        print_answer(content, json_, stood)
        if not watch or (content["finished"] >= content["asked"] and not content["running"]):
            return
        time.sleep(_WATCH_SECONDS)


def proxy(
    study: StudyPath,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 13000,
    run_dir: RunDir = None,
    set_: Overrides = None,
) -> None:
    """Stand between thousands of workers and the study's PostgreSQL (Optuna's gRPC proxy).

    It asks nobody for a password: listen where only your own jobs can reach it.
    """
    from search.trials.storage import choose_storage, serve_proxy

    spec, run = _study(study, run_dir, set_)
    serve_proxy(choose_storage(spec, run, many=True, say=say), run, host, port, say)


def conclude(result: Result | None, run: RunDirectory, as_json: bool) -> None:
    """Print what a search found; exit code 1 where it found nothing that is certified and good enough."""
    from search.cli.answers import fronted
    from search.results.gates import overall
    from search.run.finish import answer

    if result is None:
        say("the study is not complete, so nothing was certified; start it again with the same command, it continues")
        raise typer.Exit(1)
    print_answer(answer(result), as_json, fronted)
    for line in _next_steps(result, run):
        say(line)
    if result.winner is None or overall(result.gates) == "fail":
        raise typer.Exit(1)


def _next_steps(result: Result, run: RunDirectory) -> Iterator[str]:
    """Where to look next, a line each."""
    from search.problem.run_directory import PAGE, REPORT, WINNER
    from search.run.page import export_winner_command

    yield f"report    {run / REPORT}, with plots"
    yield f"explore   {run / PAGE}, in a browser"
    if result.winner is None:
        return
    yield f"winner    {run / WINNER}"
    if result.transferred is not None:
        yield f"          {result.transferred.path}"
    yield f"export    {export_winner_command(result.spec, run)}"


def _study(
    study: Path, run_dir: Path | None, set_: list[str] | None, force: bool = False
) -> tuple[StudySpec, RunDirectory]:
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import load_spec

    spec = load_spec(study, overrides(set_, force=force))
    return spec, RunDirectory.of(spec, run_dir)


def _has_all_trials(spec: StudySpec, run: RunDirectory) -> bool:
    from search.trials.read_back import is_finished
    from search.trials.storage import exists, opened_as_it_is

    if not exists(run):
        return False
    opened = opened_as_it_is(run, spec, say)
    found = opened.patiently(lambda: is_finished(opened.study, spec))
    opened.close()
    return found


def _finish_last(spec: StudySpec, run: RunDirectory) -> None:
    """Finish, where no other worker does or did."""
    from search.base.errors import StudyError
    from search.problem.run_directory import CERTIFICATE
    from search.run.one_process import finish_prepared

    try:
        with run.owned():
            if not (run / CERTIFICATE).exists():  # asked by one worker at a time
                conclude(finish_prepared(spec, run, say), run, False)
    except StudyError as error:
        say(str(error))


def _leave(stop: Stop) -> None:
    """End a worker that a signal stopped, and has nothing in hand any more; a Slurm task goes back to the queue.

    On a warning (before the time limit, or before a preemption) it requeues itself. SIGTERM comes with a preemption
    too, while the task still counts as running; a cancelled one does not.
    """
    import os

    from search.slurm.queue import QueueUnknownError, queue_states
    from search.slurm.task import owner_of_this_task, requeue

    assert stop.signal is not None
    say(f"stopped by {stop.signal.name}; nothing is lost")
    task = owner_of_this_task(os.environ)
    again = stop.signal == signal.SIGUSR1
    if task is not None and stop.signal == signal.SIGTERM:
        try:
            states = queue_states([task.job]) or {}
        except QueueUnknownError:
            states = {}
        again = task.job in states and states[task.job].state == "RUNNING"
    if task is not None and again:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which comes with the requeue, and need not be waited out
        refused = requeue(task.job)
        if refused is None:
            say("requeued")
            time.sleep(60)  # Slurm ends this process; leaving by itself would count as done
        else:
            say(f"could not requeue: {refused}")
    raise typer.Exit(_EXIT_CODES.get(stop.signal, 0))


def _standing(spec: StudySpec, run: RunDirectory) -> dict[str, Any]:
    """What `status` answers."""
    from datetime import datetime

    from search.run.launch import launched_jobs
    from search.run.status import empty_standing, standing
    from search.trials.storage import exists, opened_as_it_is

    jobs: Mapping[str, Mapping[str, int]] = launched_jobs(run)
    if not exists(run):
        if not jobs:
            run.require()
        return empty_standing(spec.search.trials, jobs).to_json()
    opened, asked = opened_as_it_is(run, spec, say), spec.search
    found = opened.patiently(
        lambda: standing(
            opened.study, run.space(), asked.trials, asked.budget_percent, datetime.now(), jobs, asked.judged
        )
    )
    opened.close()
    return found.to_json()
