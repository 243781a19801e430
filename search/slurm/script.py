"""The batch script of each step of a search: its comment, its directives, and the command that it runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Literal, get_args

from search.base.command import COMMAND
from search.base.errors import StudyError
from search.base.paths import shown
from search.problem.directives import SlurmSection, quoted, unwritable

Step = Literal["prepare", "search", "finish"]
STEPS: tuple[Step, ...] = get_args(Step)
MOST_WORKERS = 100_000
BY_HAND_WORKERS = 8
"""Workers of jobs/search.sbatch, which is the rendering for use without the launcher."""

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
