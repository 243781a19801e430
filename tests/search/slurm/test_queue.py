"""What the queue says of jobs and array tasks."""

from __future__ import annotations

import pytest

from search.slurm.queue import QueuedTask, QueueUnknownError, queue_states
from tests.search.slurm.stand_ins import Programs


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
