"""Submitting the three jobs of a search: chained, shown as they are submitted, all or none."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.directives import SlurmSection
from search.slurm.submission import Plan, Submitted, plan, submit
from ssm_mp.errors import MachineError
from tests.search.slurm.stand_ins import Programs


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
