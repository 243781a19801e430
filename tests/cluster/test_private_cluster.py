"""The private Slurm and PostgreSQL do what the other cluster tests expect of them, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import debian
from tests.cluster import processes
from tests.cluster.conftest import require
from tests.cluster.private_postgres import Mode, PrivatePostgres, private_postgres
from tests.cluster.private_slurm import Job, PrivateSlurm, private_slurm
from tests.cluster.slurm_config import NODES, PATIENCE
from tests.cluster.studying import ENVIRONMENT

# A day, which no test lasts: a job ends when it is cancelled or killed.
SLEEP = ("--requeue", "--gres=gpu:a30:1", "--output=/dev/null", "--wrap", "exec sleep 86400")


def submit(slurm: PrivateSlurm, *arguments: str) -> str:
    return slurm.run("sbatch", "--parsable", *arguments).strip()


def only(jobs: list[Job], job_id: str) -> Job:
    (job,) = [job for job in jobs if job.id == job_id]
    return job


def running(slurm: PrivateSlurm, *arguments: str) -> str:
    """The id of a job that sleeps, once its script runs."""
    job_id = submit(slurm, *arguments, *SLEEP)
    processes.wait_until(lambda: bool(slurm.pids(job_id)), lambda: str(slurm.jobs()))
    return job_id


def daemons(slurm: PrivateSlurm) -> dict[str, int]:
    """The living daemons as they have written themselves down."""
    noted = {path.name: int(path.read_text()) for path in (slurm.directory / "run").glob("*.pid")}
    living = processes.living()
    assert {name for name, pid in noted.items() if pid in living} == {
        "munged.pid", "slurmctld.pid", *(f"{node}.pid" for node in NODES),
    }  # fmt: skip
    return noted


def test_a_job_runs_and_its_output_can_be_read(slurm: PrivateSlurm, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job_id = submit(
        slurm, "--gres=gpu:a30:1", f"--output={output}", "--wrap", "echo on $SLURMD_NODENAME, in $SLURM_JOB_PARTITION"
    )
    (job,) = slurm.wait([job_id])
    assert (job.state, job.restarts) == ("COMPLETED", 0)
    assert output.read_text() == f"on {job.node}, in gpu\n"


def test_every_task_of_an_array_has_an_id_and_processes_of_its_own(slurm: PrivateSlurm) -> None:
    array = submit(slurm, "--array=0-2", "--job-name=three tasks", *SLEEP)
    tasks = [f"{array}_{number}" for number in range(3)]
    processes.wait_until(lambda: all(slurm.pids(task) for task in tasks), lambda: str(slurm.jobs()))
    pids = {task: slurm.pids(task) for task in tasks}
    assert sorted(slurm.pids(array)) == sorted(pid for own in pids.values() for pid in own)
    for task, (pid, *_) in pids.items():
        environment = Path("/proc", str(pid), "environ").read_text().split("\0")
        assert f"SLURM_ARRAY_TASK_ID={task.partition('_')[2]}" in environment
    slurm.cancel(array)
    ended = slurm.wait([array])
    assert sorted(job.id for job in ended) == tasks
    assert {(job.state, job.name) for job in ended} == {("CANCELLED", "three tasks")}


def test_more_gpus_than_a_node_has_are_refused(slurm: PrivateSlurm) -> None:
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        submit(slurm, "--nodes=1", "--gres=gpu:a30:5", "--output=/dev/null", "--wrap", "true")


def test_a_node_that_goes_down_gives_its_job_to_another(slurm: PrivateSlurm) -> None:
    job_id = running(slurm)
    node = only(slurm.jobs(), job_id).node
    before = slurm.pids(job_id)
    slurm.node_down(node)
    assert only(slurm.jobs(), job_id).restarts == 1
    assert not processes.living().keys() & set(before)
    slurm.wait(lambda jobs: only(jobs, job_id).state == "RUNNING")
    job = only(slurm.jobs(), job_id)
    assert (job.node in set(NODES) - {node}, job.restarts) == (True, 1)
    assert slurm.node_states()[node].startswith("down")
    slurm.node_up(node)
    processes.wait_until(lambda: slurm.node_states()[node] == "idle", lambda: str(slurm.node_states()))
    slurm.cancel(job_id)
    slurm.wait([job_id])


@pytest.fixture
def little_grace(slurm: PrivateSlurm) -> Iterator[None]:
    """What is preempted and does not end by itself is killed soon."""
    slurm.set_grace(1)
    yield
    slurm.set_grace(PATIENCE)


@pytest.mark.usefixtures("little_grace")
def test_an_urgent_job_preempts_and_the_preempted_one_runs_again(slurm: PrivateSlurm) -> None:
    job_id = running(slurm, "--nodelist=n2")
    other = running(slurm, "--nodelist=n3")
    urgent = slurm.submit_urgent(["n2"])
    slurm.wait(lambda jobs: only(jobs, urgent).state == "RUNNING")
    job = only(slurm.jobs(), job_id)
    assert (job.state, job.restarts) == ("PENDING", 1)  # its node is taken
    slurm.cancel(urgent)
    slurm.wait(lambda jobs: only(jobs, job_id).state == "RUNNING")
    assert only(slurm.jobs(), other).restarts == 0
    slurm.cancel_all()
    assert all(job.ended for job in slurm.jobs())


def test_a_second_start_changes_nothing(slurm: PrivateSlurm) -> None:
    job_id = running(slurm)
    before, script = daemons(slurm), slurm.pids(job_id)
    slurm.start()
    assert daemons(slurm) == before
    assert slurm.pids(job_id) == script
    slurm.cancel(job_id)
    slurm.wait([job_id])


def test_a_second_slurm_runs_beside_the_first_and_leaves_nothing_behind(slurm: PrivateSlurm) -> None:
    def failing(directory: Path) -> None:
        with private_slurm(directory) as second:
            running(second)
            running(second)
            # munged, the controller, the nodes, and two jobs of a script and its step.
            assert len(processes.of_directory(directory)) >= 2 + len(NODES) + 2 * 2
            raise RuntimeError("a test that fails")

    with processes.private_directory("ssm-slurm") as directory:
        with pytest.raises(RuntimeError, match="a test that fails"):
            failing(directory)
        assert not processes.of_directory(directory)
        assert not directory.exists()
    assert set(slurm.node_states()) == set(NODES)


def test_the_folder_of_a_killed_owner_is_removed_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # No process has a number above the highest that Linux gives.
    abandoned = tmp_path / "ssm-test-4194305-x"
    abandoned.mkdir()
    with processes.private_directory("ssm-test") as directory:
        assert directory.parent == tmp_path
        assert not abandoned.exists()
    assert not directory.exists()


def test_ports_that_are_reserved_are_nobody_elses_until_they_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PORTS", range(31_990, 32_000))
    ask = "from tests.cluster import processes; processes.PORTS = range(31_990, 32_000)\n"
    ask += "with processes.reserved_ports(1) as found: print(*found)"

    def elsewhere() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", ask], env=ENVIRONMENT, capture_output=True, text=True, timeout=processes.HUNG,
            check=False,
        )  # fmt: skip

    with processes.reserved_ports(4) as mine:
        with processes.reserved_ports(5) as others:
            assert len({*mine, *others}) == 9
            (left,) = set(processes.PORTS) - {*mine, *others}
            assert elsewhere().stdout == f"{left}\n"
            with processes.reserved_ports(1):
                assert "expected 1 free TCP ports" in elsewhere().stderr
        assert elsewhere().returncode == 0


def test_missing_programs_that_no_package_brings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(debian, "SYSTEM_FOLDERS", ())
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(debian.NotInstallableError, match="programs absent are missing; the packages one two would"):
        debian.install(["one", "two"], ["absent"])


def test_what_cannot_be_installed_is_skipped_aloud_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise debian.NotInstallableError("no apt-get")

    monkeypatch.setattr(debian, "install", refuse)
    monkeypatch.delenv("CI", raising=False)
    with pytest.warns(UserWarning, match="DID NOT RUN: no apt-get"), pytest.raises(pytest.skip.Exception):
        require([], [])
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no apt-get"):
        require([], [])


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_postgres_keeps_committed_rows_over_a_restart(postgres: PrivatePostgres, mode: Mode) -> None:
    name = f"kept_{mode}"
    assert postgres.create_database(name).endswith(f"@127.0.0.1:{postgres.port}/{name}")
    postgres.psql("CREATE TABLE trials (number int)", name)
    postgres.psql("INSERT INTO trials SELECT generate_series(1, 1000)", name)
    postgres.restart(mode)
    assert postgres.psql("SELECT count(*), max(number) FROM trials", name) == "1000|1000"


def test_postgres_flushes_and_has_room_for_many_workers(postgres: PrivatePostgres) -> None:
    settings = "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'max_connections') ORDER BY name"
    assert postgres.psql(settings).splitlines() == ["fsync|on", "max_connections|200"]


def test_postgres_wants_the_password_which_no_address_shows(postgres: PrivatePostgres) -> None:
    assert postgres.password not in postgres.url + repr(postgres)
    stranger = PrivatePostgres(postgres.directory, postgres.port, "wrong")
    with pytest.raises(RuntimeError, match="password authentication failed"):
        stranger.psql("SELECT 1")


def test_a_stopped_postgres_starts_once(postgres: PrivatePostgres) -> None:
    postgres.stop()
    postgres.stop()
    assert not postgres.running()
    postgres.start()
    first = postgres.psql("SELECT pg_postmaster_start_time()")
    postgres.start()
    assert postgres.psql("SELECT pg_postmaster_start_time()") == first


def test_a_second_postgres_runs_beside_the_first_and_leaves_nothing_behind(postgres: PrivatePostgres) -> None:
    def failing(directory: Path) -> None:
        with private_postgres(directory) as second:
            assert second.psql("SELECT 1") == "1"
            assert processes.of_directory(directory)
            raise RuntimeError("a test that fails")

    with processes.private_directory("ssm-postgres") as directory:
        with pytest.raises(RuntimeError, match="a test that fails"):
            failing(directory)
        assert not processes.of_directory(directory)
        assert not directory.exists()
    assert postgres.psql("SELECT 1") == "1"
