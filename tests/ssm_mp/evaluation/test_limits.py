"""What machine, control groups and Slurm say that a process may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.evaluation.memory import memory_limit

GIB = 1 << 30


def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    outside_slurm(monkeypatch)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemAvailable: {24 << 20} kB\n", encoding="utf-8")
    return tmp_path


def group(root: Path, line: str, limits: dict[str, str]) -> None:
    (root / "proc/self/cgroup").write_text(line + "\n", encoding="utf-8")
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n", encoding="utf-8")


def bytes_and_who(root: Path) -> tuple[float, str]:
    found = memory_limit(root)
    assert found is not None
    return found.bytes / GIB, found.who


def test_without_anything_tighter_it_is_what_the_machine_has_free(root: Path) -> None:
    group(root, "0::/user.slice", {"user.slice/memory.max": "max"})
    assert bytes_and_who(root) == (24, "this machine has free")


def test_a_limit_of_an_outer_control_group_counts(root: Path) -> None:
    group(root, "0::/job/step", {"job/step/memory.max": "max", "job/memory.max": str(6 * GIB)})
    assert bytes_and_who(root) == (6, "this job's control group allows")


def test_the_first_version_of_control_groups_counts_too(root: Path) -> None:
    limits = {"memory/slurm/job/memory.limit_in_bytes": str(5 * GIB), "memory/memory.limit_in_bytes": str(1 << 62)}
    group(root, "4:memory:/slurm/job", limits)
    assert bytes_and_who(root) == (5, "this job's control group allows")


def test_what_slurm_gave_counts_where_it_does_not_enforce_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "3072")
    assert bytes_and_who(root) == (3, "this Slurm job was given")


def test_what_slurm_gave_each_cpu_counts_for_all_of_the_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1024")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert bytes_and_who(root) == (4, "this Slurm job was given")


def test_a_slurm_job_that_was_given_all_of_its_node_is_not_given_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert bytes_and_who(root) == (24, "this machine has free")


def test_a_control_group_of_several_controllers_counts(root: Path) -> None:
    group(root, "9:hugetlb,memory:/job", {"memory/job/memory.limit_in_bytes": str(5 * GIB)})
    assert bytes_and_who(root) == (5, "this job's control group allows")


def test_where_nothing_says_anything_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside_slurm(monkeypatch)
    assert memory_limit(tmp_path) is None
