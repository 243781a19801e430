"""Launching a study on Slurm: what was submitted for a run, and whether it is still under way. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from search.base.errors import StudyError
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec
from search.run.status import queued_jobs
from search.slurm.queue import QueueUnknownError, queue_states
from search.slurm.script import STEPS, command_of_this_python
from search.slurm.submission import Plan, plan, submit
from search.trials.storage import Say, choose_storage
from ssm_mp.errors import SsmMpError

LAUNCH, FAILED = "launch.json", "failed.json"
"""Files of a run directory: the jobs of its last launch; why preparing it failed."""
JOBS, LOGS = "jobs", "logs"
"""Folders of a run directory: its batch scripts and their logs."""

_OVER = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
)
"""Slurm's states of a task that will not run again."""


def dry_run_text(spec: StudySpec, run: RunDirectory, arguments: Sequence[str], workers: int) -> str:
    """The scripts and submissions of a launch, to read."""
    planned = _plan(spec, run, arguments, workers)
    scripts = "\n".join(f"# {script.path}\n{script.text}" for script in planned.scripts)
    return f"{scripts}\n# submissions, from this folder\n" + "\n".join(planned.commands())


def submit_study(
    spec: StudySpec, run: RunDirectory, arguments: Sequence[str], workers: int, say: Say
) -> dict[str, Any]:
    """Submit the three steps of a study; what the command line answers.

    Raises StudyError where an earlier launch of this run is still in the queue, or sbatch refuses.
    """
    _require_over(run)
    planned = _plan(spec, run, arguments, workers)
    began = run.path.exists()
    try:
        choose_storage(spec, run, many=True, say=say)
        (run / FAILED).unlink(missing_ok=True)
        jobs = submit(planned)
    except SsmMpError:
        if not began:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    steps = {"prepare": jobs.prepare, "search": jobs.search, "finish": jobs.finish}
    run.write_json(LAUNCH, {"jobs": steps, "workers": workers, "arguments": list(arguments)})
    return {
        "jobs": steps,
        "workers": workers,
        "logs": str(run / LOGS),
        "status": " ".join(["ssm-mp", "status", *arguments]),
        "cancel": " ".join(["scancel", *steps.values()]),
    }


def _plan(spec: StudySpec, run: RunDirectory, arguments: Sequence[str], workers: int) -> Plan:
    command = command_of_this_python(spec.slurm)
    return plan(spec.slurm, arguments, workers=workers, jobs=run / JOBS, logs=run / LOGS, command=command)


def idle_gpu_note(spec: StudySpec) -> str | None:
    """A word on a GPU that is asked of Slurm and that the study does not use; None where that is not so."""
    asked = [line for line in spec.slurm.directives() if line.startswith(("--gres=gpu", "--gpus"))]
    if not asked or spec.search.device != "cpu":
        return None
    return (
        f'note: {asked[0]} asks for a GPU, and [search] device = "cpu" leaves it idle: say device = "cuda", or '
        "[slurm] gres = false"
    )


def _require_over(run: RunDirectory) -> None:
    """Refuse a second launch beside a living one: each would finish, and certify, the same study."""
    steps = _launched(run)
    states = queue_states(steps.values()) or {}
    alive = sorted(name for name, task in states.items() if task.state not in _OVER)
    if alive:
        raise StudyError(
            f"{run.path}: launched already, as jobs {', '.join(steps.values())}, of which {len(alive)} tasks are still "
            f"in the queue; watch them with `ssm-mp status`, or end them first: scancel {' '.join(steps.values())}. "
            "More workers for a launched study: sbatch jobs/search.sbatch STUDY"
        )


def launched_jobs(run: RunDirectory) -> dict[str, dict[str, int]]:
    """What the queue says of the last launch: step → state → tasks. Empty where nothing was, or no queue answers."""
    try:
        return queued_jobs(_launched(run), queue_states(_launched(run).values()) or {})
    except QueueUnknownError:
        return {}


def _launched(run: RunDirectory) -> dict[str, str]:
    stored = run.read_json(LAUNCH) or {}
    jobs: dict[str, str] = stored.get("jobs", {})
    return {step: jobs[step] for step in STEPS if step in jobs}


def require_not_failed(run: RunDirectory) -> None:
    """Raise StudyError, with the reason, where preparing this study failed: no worker could do better."""
    failed = run.read_json(FAILED)
    if failed is not None:
        raise StudyError(f"preparing this study failed: {failed['error']} (mend it, then launch again)")
