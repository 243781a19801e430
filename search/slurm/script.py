"""Slurm: the batch scripts of a search, submitting them, and asking the queue."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from search.base.command import COMMAND
from search.base.errors import StudyError
from search.base.paths import shown
from search.problem.directives import SlurmSection, quoted, unwritable
from ssm_mp.errors import MachineError

Step = Literal["prepare", "search", "finish"]
STEPS: tuple[Step, ...] = get_args(Step)
MOST_WORKERS = 100_000
BY_HAND_WORKERS = 8
"""Workers of jobs/search.sbatch, which is the rendering for use without the launcher."""

_SUBMIT_SECONDS = 120.0  # sbatch itself waits and tries again where the controller is busy
_ASK_SECONDS = 30.0

_BY_HAND: dict[Step, str] = {
    "prepare": """\
Prepare a study in one job: baseline and probes. By hand, the three steps one after the other:
    prepare=$(sbatch --parsable jobs/prepare.sbatch studies/x.toml)
    search=$(sbatch --parsable --dependency=afterany:$prepare jobs/search.sbatch studies/x.toml)
    sbatch --dependency=afterany:$search jobs/finish.sbatch studies/x.toml
afterany waits through requeues and never hangs; workers see within a second that the preparation failed.""",
    "search": """\
Search with many workers, one a task of the array. By hand this script does everything:
    sbatch jobs/search.sbatch studies/x.toml
The workers prepare the study together, and the last one to be done finishes it.""",
    "finish": """\
Finish a study: front, certificate, plots, report. By hand, behind the workers:
    sbatch --dependency=afterany:SEARCH_JOB jobs/finish.sbatch studies/x.toml
afterany waits through requeues and never hangs; where trials are missing it says so, and certifies nothing.""",
}

_ANY_BY_HAND = """
Options of sbatch go before the script (sbatch --array=0-31%16 ...), options of ssm-mp behind the study.
Where ssm-mp is not on PATH: SSM_MP=.venv/bin/ssm-mp sbatch ..."""

_LAUNCHED: dict[Step, str] = {
    "prepare": "Written by `ssm-mp launch`: baseline and probes, before the workers.",
    "search": """\
Written by `ssm-mp launch`: the workers, one a task of the array. They wait for the preparation with afterany, which
goes on through requeues and never hangs; they see within a second that it failed.""",
    "finish": """\
Written by `ssm-mp launch`: front, certificate, plots, report. It waits for the workers with afterany, which goes on
through requeues and never hangs, however they end.""",
}


def render(
    step: Step,
    section: SlurmSection,
    *,
    command: str | None = None,
    workers: int = BY_HAND_WORKERS,
    logs: str | None = None,
) -> str:
    """The batch script of one step; its own positional arguments are the study and further options.

    command: the shell-quoted program, or None for `$SSM_MP` or `ssm-mp`. logs: folder of the logs, or None for a
    script used by hand, which logs where it is submitted.
    """
    by_hand = logs is None
    comment = _BY_HAND[step] + (_ANY_BY_HAND if step == "search" else "") if by_hand else _LAUNCHED[step]
    directives = [f"--job-name=ssm-mp-{step}", *section.directives(), *_own_directives(step, section, workers, logs)]
    verb = {"prepare": "prepare", "search": "worker --finish" if by_hand else "worker", "finish": "finish"}[step]
    lines = [
        "#!/bin/bash",
        *(f"# {line}".rstrip() for line in comment.splitlines()),
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        *(["trap '' USR1  # the warning may come before Python listens for it"] if step != "finish" else []),
        "set -e  # not -u: modules and virtual environments often read unset variables",
        *section.setup.splitlines(),
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        # exec: Slurm warns the batch shell alone, so Python has to take its place
        f'exec {command or "${SSM_MP:-ssm-mp}"} {verb} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _own_directives(step: Step, section: SlurmSection, workers: int, logs: str | None) -> Iterator[str]:
    """What the launcher itself needs of Slurm."""
    if step == "search":
        if not 1 <= workers <= MOST_WORKERS:
            raise StudyError(f"--workers {workers}: expected 1 to {MOST_WORKERS}")
        yield f"--array=0-{workers - 1}" + (f"%{section.throttle}" if section.throttle else "")
    pattern = "%x-%A_%a.log" if step == "search" else "%x-%j.log"
    if logs is not None:
        if unwritable(shown(logs)):
            raise StudyError(
                f"{logs}: Slurm cannot write logs there: expected a path without quotes, backslashes or control "
                "characters; choose another with --run-dir"
            )
        pattern = f"{logs.replace('%', '%%')}/{pattern}"
    yield f"--output={quoted(pattern)}"
    yield "--open-mode=append"
    yield "--requeue"
    if step != "finish":
        yield f"--signal=B:USR1@{section.warning_seconds}"


def command_of_this_python(section: SlurmSection) -> str | None:
    """This interpreter's `ssm-mp`, shell-quoted, so that nothing need be activated; None where `setup` says how."""
    return None if section.setup else shlex.join(COMMAND)


@dataclass(frozen=True)
class Script:
    """One batch script: where it is to lie, and the step that it waits for."""

    step: Step
    path: Path
    text: str
    after: Step | None

    def command(self, arguments: Sequence[str], after: str = "") -> tuple[str, ...]:
        """The sbatch call; `after` is the job it waits for, whatever becomes of it (`afterok` could hang)."""
        dependency = (f"--dependency=afterany:{after}",) if after else ()
        return ("sbatch", "--parsable", *dependency, str(self.path), *arguments)


@dataclass(frozen=True)
class Plan:
    """The three scripts of a search, in the order of submission, and the arguments they are given."""

    scripts: tuple[Script, ...]
    arguments: tuple[str, ...]
    logs: Path

    def commands(self) -> tuple[str, ...]:
        """The three submissions as shell lines that may be copied."""
        return tuple(_shell_line(script, self.arguments) for script in self.scripts)


def plan(
    section: SlurmSection, arguments: Sequence[str], *, workers: int, jobs: Path, logs: Path, command: str | None
) -> Plan:
    """What `submit` would do. arguments: the study and options for each of the steps; jobs: folder of the scripts."""
    scripts = tuple(
        Script(
            step,
            jobs / f"{step}.sbatch",
            render(step, section, command=command, workers=workers, logs=str(logs)),
            after,
        )
        for step, after in zip(STEPS, (None, *STEPS), strict=False)
    )
    return Plan(scripts, tuple(arguments), logs)


def _shell_line(script: Script, arguments: Sequence[str]) -> str:
    words = [shlex.quote(word) for word in script.command(arguments)]
    if script.after:
        words.insert(2, f"--dependency=afterany:${script.after}")
    return f"{script.step}=$({' '.join(words)})"


@dataclass(frozen=True)
class Submitted:
    """The job ids of a search."""

    prepare: str
    search: str
    finish: str


def submit(plan: Plan) -> Submitted:
    """Write the scripts and submit them from the current folder: all three, or none.

    Raises StudyError with sbatch's own words where it refuses, MachineError where there is no Slurm to be reached.
    """
    plan.logs.mkdir(parents=True, exist_ok=True)  # Slurm would not: the job would fail without a word
    for script in plan.scripts:
        script.path.parent.mkdir(parents=True, exist_ok=True)
        script.path.write_text(script.text, encoding="utf-8", errors="surrogateescape")  # paths of any bytes
    jobs: dict[Step, str] = {}
    try:
        for script in plan.scripts:
            jobs[script.step] = _submitted(script, plan.arguments, jobs[script.after] if script.after else "")
    except (StudyError, MachineError) as error:
        raise type(error)(f"{error}{_taken_back(jobs.values())}") from None
    except BaseException:
        _taken_back(jobs.values())
        raise
    return Submitted(**jobs)


def _submitted(script: Script, arguments: Sequence[str], after: str) -> str:
    """The id of one submitted job."""
    try:
        answer = _asked(script.command(arguments, after), _SUBMIT_SECONDS)
    except (FileNotFoundError, PermissionError):
        raise MachineError(
            "no sbatch on PATH: this is no login node of a Slurm cluster; `ssm-mp search STUDY --workers N` starts "
            "workers on this machine, and --dry-run shows what would be submitted"
        ) from None
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{script.path}: sbatch did not answer within {_SUBMIT_SECONDS:.0f} s; see `squeue --me` for whether the "
            "job is there all the same, then launch again"
        ) from None
    found = re.fullmatch(r"(\d+)(;\S+)?", (answer.stdout.split() or [""])[-1])
    if answer.returncode == 0 and found:
        return found[1]
    if answer.returncode == 0:
        raise MachineError(f"{script.path}: expected a job id from sbatch --parsable, found {answer.stdout.strip()!r}")
    words = _last_words(answer.stderr)
    if re.search(r"contact slurm controller|timed out|configuration source|fetch config", words, re.IGNORECASE):
        raise MachineError(f"{script.path}: Slurm cannot be reached (sbatch exit {answer.returncode}: {words})")
    remedy = "see its #SBATCH lines, and change them with [slurm] in the study"
    if "job array" in words:
        remedy = "take no more --workers than MaxArraySize (1001 unless `scontrol show config` says otherwise)"
    raise StudyError(f"{script.path}: sbatch refused it (exit {answer.returncode}: {words}); {remedy}")


def _taken_back(jobs: Iterable[str]) -> str:
    """Cancel jobs; what to add to the message."""
    ids = list(jobs)
    if not ids:
        return ""
    problem = _problem(["scancel", *ids])
    if problem:
        return (
            f"; {', '.join(ids)} was already submitted and could not be cancelled ({problem}): scancel {' '.join(ids)}"
        )
    return f"; {', '.join(ids)}, already submitted, was cancelled"


@dataclass(frozen=True)
class QueuedTask:
    """One job or array task as the queue has it. `state` is Slurm's word in full, such as RUNNING."""

    state: str
    restarts: int
    node: str
    reason: str


class QueueUnknownError(MachineError):
    """There is a Slurm, but its queue cannot be asked at the moment."""


_COLUMNS = {
    "ArrayJobID": 32,
    "ArrayTaskID": 24,
    "JobID": 32,
    "State": 24,
    "RestartCnt": 12,
    "NodeList": 64,
    "Reason": 80,
}


def queue_states(job_ids: Iterable[str]) -> dict[str, QueuedTask] | None:
    """The queue's word on jobs (`12`) and array tasks (`12_3`); an array job's id stands for all of its tasks.

    Keys are `12_3` for array tasks and `12` for others; what the queue no longer knows is missing. None where this
    machine has no `squeue`. Raises QueueUnknownError where it has one that does not answer.
    """
    ids = sorted({job.partition("_")[0] for job in job_ids})
    if not ids:
        return {}
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    try:
        answer = _asked(["squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-O", columns], _ASK_SECONDS)
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        raise QueueUnknownError(f"squeue did not answer within {_ASK_SECONDS:.0f} s; try again later") from None
    if answer.returncode == 0:
        return dict(_queued(answer.stdout))
    words = _last_words(answer.stderr)
    if "Invalid job id" not in words:
        raise QueueUnknownError(f"squeue failed (exit {answer.returncode}: {words}); try again later")
    if len(ids) == 1:
        return {}
    found = [queue_states([one]) or {} for one in ids]  # one unknown id must not make the others look gone
    return {task: state for states in found for task, state in states.items()}


def _queued(listing: str) -> Iterator[tuple[str, QueuedTask]]:
    """The rows of `squeue -O` with `_COLUMNS`."""
    for line in listing.splitlines():
        cells, start = [], 0
        for width in _COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        array, task, job, state, restarts, node, reason = cells
        if job.isdecimal() and state:
            name = f"{array}_{task}" if task.isdecimal() else job
            yield name, QueuedTask(state, int(restarts) if restarts.isdecimal() else 0, node, reason)


@dataclass(frozen=True)
class SlurmTask:
    """The job or array task that a process runs in. `raw` is the job id without array, as `scontrol` lists it."""

    job: str
    restart: int
    node: str
    raw: str


def owner_of_this_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """The Slurm task of a process with this environment; None outside Slurm."""
    raw = environ.get("SLURM_JOB_ID", "")
    if not raw:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
    job = f"{array}_{task}" if array and task else raw
    return SlurmTask(job, int(environ.get("SLURM_RESTART_COUNT") or 0), environ.get("SLURMD_NODENAME", ""), raw)


def requeue(job: str) -> str | None:
    """Put a running job or array task (`12_3`) back into the queue; the reason where Slurm does not."""
    return _problem(["scontrol", "requeue", job])


def _problem(command: Sequence[str]) -> str | None:
    """Run one of Slurm's programs; what went wrong, if anything."""
    try:
        answer = _asked(command, _ASK_SECONDS)
    except (FileNotFoundError, PermissionError):
        return f"no {command[0]} on PATH"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer within {_ASK_SECONDS:.0f} s"
    return None if answer.returncode == 0 else f"{command[0]} exit {answer.returncode}: {_last_words(answer.stderr)}"


def _asked(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs without the user's filters (SQUEUE_PARTITION would hide living workers)."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        env=environ,
        check=False,
    )


def _last_words(stderr: str) -> str:
    """The end of an error output: a site's own checks speak before Slurm's last line."""
    lines = [re.sub(r"^s[a-z]+: (error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "no message"
