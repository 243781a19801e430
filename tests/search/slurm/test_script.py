from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.directives import SlurmSection
from search.slurm.script import (
    STEPS,
    Plan,
    QueuedTask,
    QueueUnknownError,
    SlurmTask,
    Step,
    Submitted,
    command_of_this_python,
    owner_of_this_task,
    plan,
    queue_states,
    render,
    requeue,
    submit,
)
from ssm_mp.errors import MachineError
from tests.cluster.processes import HUNG

JOBS = Path(__file__).parents[3] / "jobs"


class Programs:
    """Stand-ins for Slurm's programs, which are all that PATH has; each call is noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.log = folder / "calls"

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{body}\n')
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", str(made.folder))
    return made


@pytest.fixture
def three(tmp_path: Path) -> Plan:
    return plan(
        SlurmSection(),
        ["studies/x.toml", "--run-dir", "runs/x"],
        workers=4,
        jobs=tmp_path / "run" / "jobs",
        logs=tmp_path / "run" / "logs",
        command="ssm-mp",
    )


NUMBERED = """\
case "$*" in
  *prepare.sbatch*) echo 11;;
  *search.sbatch*) echo "12;east";;
  *) echo "a word of welcome"; echo 13;;
esac"""
SECOND_REFUSED = """\
case "$*" in
  *search.sbatch*)
    echo "sbatch: error: this site wants an account" >&2
    echo "sbatch: error: Batch job submission failed: Unspecified error" >&2
    exit 1;;
  *) echo 11;;
esac"""


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


def test_steps_are_chained_and_logged_where_the_plan_says(programs: Programs, three: Plan) -> None:
    programs.write("sbatch", NUMBERED)
    assert submit(three) == Submitted("11", "12", "13")
    paths = [str(script.path) for script in three.scripts]
    assert programs.calls == [
        f"sbatch --parsable {paths[0]} studies/x.toml --run-dir runs/x",
        f"sbatch --parsable --dependency=afterany:11 {paths[1]} studies/x.toml --run-dir runs/x",
        f"sbatch --parsable --dependency=afterany:12 {paths[2]} studies/x.toml --run-dir runs/x",
    ]
    for script in three.scripts:
        assert script.path.read_text() == script.text
        assert f"#SBATCH --output={three.logs}/%x-" in script.text
    assert three.logs.is_dir()


def test_shown_commands_submit_the_same(programs: Programs, three: Plan) -> None:
    programs.write("sbatch", NUMBERED.replace("12;east", "12").replace('echo "a word of welcome"; ', ""))
    spaced = dataclasses.replace(three, arguments=("my studies/x.toml",))
    submit(spaced)
    submitted = programs.calls
    programs.log.unlink()
    subprocess.run(["/bin/sh", "-ec", "\n".join(spaced.commands())], check=True)
    assert programs.calls == submitted


def test_a_refused_step_cancels_those_before_it(programs: Programs, three: Plan) -> None:
    programs.write("sbatch", SECOND_REFUSED)
    programs.write("scancel", "exit 0")
    with pytest.raises(StudyError) as caught:
        submit(three)
    for words in ("search.sbatch: sbatch refused it (exit 1", "this site wants an account", "11, already submitted"):
        assert words in str(caught.value)
    assert programs.calls[2:] == ["scancel 11"]


def test_more_workers_than_the_cluster_allows_are_told_the_limit(programs: Programs, three: Plan) -> None:
    programs.write(
        "sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1"
    )
    with pytest.raises(StudyError, match=r"take no more --workers than MaxArraySize"):
        submit(three)


def test_a_step_that_cannot_be_cancelled_is_named(programs: Programs, three: Plan) -> None:
    programs.write("sbatch", SECOND_REFUSED)
    programs.write("scancel", "echo 'scancel: error: Access denied' >&2; exit 1")
    with pytest.raises(StudyError, match=r"could not be cancelled \(scancel exit 1: Access denied\): scancel 11"):
        submit(three)


def test_without_sbatch_other_ways_are_named(programs: Programs, three: Plan) -> None:
    with pytest.raises(MachineError, match=r"no sbatch on PATH.*--workers N.*--dry-run"):
        submit(three)
    assert programs.calls == []


def test_a_controller_that_is_down_is_the_machines_fault(programs: Programs, three: Plan) -> None:
    programs.write(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2\n"
        "exit 1",
    )
    with pytest.raises(MachineError, match=r"cannot be reached .*connect failure"):
        submit(three)


def test_an_answer_without_a_job_id_is_shown(programs: Programs, three: Plan) -> None:
    programs.write("sbatch", "echo queued, thank you")
    with pytest.raises(MachineError, match=r"expected a job id .*'queued, thank you'"):
        submit(three)


def row(*cells: str) -> str:
    widths = (32, 24, 32, 24, 12, 64, 80)
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


LISTING = "\n".join(
    [
        row("12", "0", "14", "RUNNING", "2", "n1", "None"),
        row("12", "1", "12", "PENDING", "0", "", "launch failed requeued held"),
        row("11", "N/A", "11", "COMPLETED", "0", "n0", "None"),
        "CLUSTER: east",
    ]
)


def test_the_queue_is_read_by_task(programs: Programs) -> None:
    programs.write("squeue", f"while read -r line; do echo \"$line\"; done <<'END'\n{LISTING}\nEND")
    assert queue_states(["12_0", "11", "12_1", "99"]) == {
        "12_0": QueuedTask("RUNNING", 2, "n1", "None"),
        "12_1": QueuedTask("PENDING", 0, "", "launch failed requeued held"),
        "11": QueuedTask("COMPLETED", 0, "n0", "None"),
    }
    assert "-j 11,12,99 " in programs.calls[0]


def test_no_jobs_need_no_queue(programs: Programs) -> None:
    assert queue_states([]) == {}
    assert programs.calls == []


def test_a_machine_without_squeue_is_told_from_a_queue_that_does_not_answer(programs: Programs) -> None:
    assert queue_states(["12"]) is None
    programs.write("squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(QueueUnknownError, match=r"squeue failed \(exit 1: Unable to contact slurm controller\)"):
        queue_states(["12"])


def test_jobs_that_slurm_has_forgotten_do_not_hide_the_others(programs: Programs) -> None:
    body = "case \"$*\" in *'-j 12 '*) echo '{}'; exit 0;; esac\n".format(
        row("12", "0", "12", "RUNNING", "0", "n1", "")
    )
    programs.write("squeue", body + "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue_states(["11"]) == {}
    assert queue_states(["11", "12_0"]) == {"12_0": QueuedTask("RUNNING", 0, "n1", "")}


def test_the_users_filters_do_not_hide_workers(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    programs.write(
        "squeue", f"test -n \"$SQUEUE_PARTITION\" || echo '{row('12', 'N/A', '12', 'RUNNING', '0', '', '')}'"
    )
    assert set(queue_states(["12"]) or {}) == {"12"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "15", "SLURMD_NODENAME": "n1"}, SlurmTask("15", 0, "n1", "15")),
        (
            {
                "SLURM_JOB_ID": "15",
                "SLURM_ARRAY_JOB_ID": "12",
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_RESTART_COUNT": "2",
                "SLURMD_NODENAME": "n1",
            },
            SlurmTask("12_3", 2, "n1", "15"),
        ),
    ],
)
def test_a_process_knows_its_task(environ: dict[str, str], expected: SlurmTask | None) -> None:
    assert owner_of_this_task(environ) == expected


def test_requeueing_tells_why_it_did_not(programs: Programs) -> None:
    assert requeue("12_3") == "no scontrol on PATH"
    programs.write("scontrol", "exit 0")
    assert requeue("12_3") is None
    assert programs.calls == ["scontrol requeue 12_3"]
    programs.write("scontrol", "echo 'Requested operation is presently disabled for job 12_3' >&2; exit 1")
    assert requeue("12_3") == "scontrol exit 1: Requested operation is presently disabled for job 12_3"


def main() -> None:
    """Write jobs/ anew."""
    for step in STEPS:
        (JOBS / f"{step}.sbatch").write_text(render(step, SlurmSection()), encoding="utf-8")


if __name__ == "__main__":
    main()
