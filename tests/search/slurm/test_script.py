"""The batch scripts of a search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.directives import SlurmSection
from search.slurm.script import STEPS, Step, command_of_this_python, render
from tests.cluster.processes import HUNG

JOBS = Path(__file__).parents[3] / "jobs"


@pytest.mark.parametrize("step", STEPS)
def test_scripts_for_use_by_hand_are_the_rendering(step: Step) -> None:
    assert (JOBS / f"{step}.sbatch").read_bytes() == render(step, SlurmSection()).encode(), (
        f"jobs/{step}.sbatch is not what search/slurm/script.py renders: look at the difference, then write it anew "
        "with `python -m tests.search.slurm.test_script`"
    )


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_scripts_are_valid_shell_with_every_directive_before_the_first_command(step: Step, by_hand: bool) -> None:
    section = SlurmSection(setup="module load cuda\nsource 'a b/bin/activate'")
    text = render(step, section, logs=None if by_hand else "runs/x/logs")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in text.splitlines()[first:])
    assert text.splitlines()[-4:-2] == section.setup.splitlines()


@pytest.mark.parametrize(
    ("step", "logs", "expected"),
    [
        ("prepare", None, "prepare <x.toml> <two words>"),
        ("search", None, "worker --finish <x.toml> <two words>"),
        ("finish", None, "finish <x.toml> <two words>"),
        ("prepare", "logs", "prepare <x.toml> <two words>"),
        ("search", "logs", "worker <x.toml> <two words>"),
        ("finish", "logs", "finish <x.toml> <two words>"),
    ],
)
def test_each_script_runs_its_step_with_its_arguments(
    tmp_path: Path, step: Step, logs: str | None, expected: str
) -> None:
    setup = 'say() { local it=; for one; do case $one in *[\\ .]*) it+=" <$one>";; *) it+=" $one";; esac; done; '
    setup += 'echo "${it# }"; }\nexec() { say "${@:3}"; }\nSSM_MP="apptainer image.sif"'
    path = tmp_path / "script"
    path.write_text(render(step, SlurmSection(setup=setup), logs=logs))
    ran = subprocess.run(["bash", path, "x.toml", "two words"], capture_output=True, text=True, check=True)
    assert ran.stdout == expected + "\n"


@pytest.mark.parametrize("step", ["prepare", "search"])
def test_a_warning_before_python_listens_does_not_kill(tmp_path: Path, step: Step) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\nprint(os.getpid(), signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, flush=True)"
    )
    path = tmp_path / "script"
    path.write_text(render(step, SlurmSection(setup="kill -USR1 $$"), command=f"{sys.executable} {program}"))
    with subprocess.Popen(["bash", path], stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=HUNG)
    assert out == f"{process.pid} True\n"  # its own process id: Slurm warns this one alone
    assert process.returncode == 0


def test_a_failing_setup_line_stops_the_step(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(render("search", SlurmSection(setup="false"), command="echo ran"))
    ran = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")


def test_the_array_has_one_task_a_worker_and_only_the_search_has_one() -> None:
    assert "#SBATCH --array=0-4\n" in render("search", SlurmSection(), workers=5)
    assert "#SBATCH --array=0-4%2\n" in render("search", SlurmSection(throttle=2), workers=5)
    assert "--array" not in render("prepare", SlurmSection(), workers=5) + render("finish", SlurmSection(), workers=5)


def test_the_warning_time_is_the_sections() -> None:
    section = SlurmSection(warning_seconds=45)
    assert "#SBATCH --signal=B:USR1@45\n" in render("search", section)
    assert "#SBATCH --signal=B:USR1@45\n" in render("prepare", section)
    assert "--signal" not in render("finish", section)


@pytest.mark.parametrize("workers", [0, -1, 100_001])
def test_impossible_numbers_of_workers_are_refused(workers: int) -> None:
    with pytest.raises(StudyError, match=f"--workers {workers}: expected 1 to 100000"):
        render("search", SlurmSection(), workers=workers)


def test_folders_of_logs_are_taken_literally() -> None:
    assert '#SBATCH --output="a b/50%%/%x-%A_%a.log"\n' in render("search", SlurmSection(), logs="a b/50%")
    with pytest.raises(StudyError, match="choose another with --run-dir"):
        render("search", SlurmSection(), logs='a"b')


def test_this_python_is_the_program_unless_setup_says_how() -> None:
    command = command_of_this_python(SlurmSection())
    assert command is not None
    ran = subprocess.run(["bash", "-c", f'{command} "$@"', "x", "--help"], capture_output=True, text=True, check=True)
    assert "ssm-mp" in ran.stdout
    assert command_of_this_python(SlurmSection(setup="module load python")) is None


def main() -> None:
    """Write jobs/ anew."""
    for step in STEPS:
        (JOBS / f"{step}.sbatch").write_text(render(step, SlurmSection()), encoding="utf-8")


if __name__ == "__main__":
    main()
