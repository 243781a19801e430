"""The three jobs of a search: planned, shown as shell lines, and submitted all or none."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.base.errors import StudyError
from search.problem.directives import SlurmSection
from search.slurm.programs import asked, last_words, problem
from search.slurm.script import STEPS, Step, render
from ssm_mp.errors import MachineError

_SUBMIT_SECONDS = 120.0  # sbatch itself waits and tries again where the controller is busy


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
        answer = asked(script.command(arguments, after), _SUBMIT_SECONDS)
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
    words = last_words(answer.stderr)
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
    refusal = problem(["scancel", *ids])
    if refusal:
        return (
            f"; {', '.join(ids)} was already submitted and could not be cancelled ({refusal}): scancel {' '.join(ids)}"
        )
    return f"; {', '.join(ids)}, already submitted, was cancelled"
