"""A process and the job or array task that it runs in."""

from __future__ import annotations

import pytest

from search.slurm.task import SlurmTask, owner_of_this_task, requeue
from tests.search.slurm.stand_ins import Programs


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
