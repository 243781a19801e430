"""Workers outside Slurm whose trials are in PostgreSQL: killed, stopped, and with the server restarted under them."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.measure.objective import Measured
from search.run.claim import LOST
from search.run.study import begin
from search.run.widening import move_study
from search.run.worker_loop import Task
from search.trials.maps import map_key, map_of
from search.trials.optuna_storage import storage_of
from search.trials.read_back import counts
from search.trials.storage import OpenStudy, connect, stored_choice
from tests.cluster import studying
from tests.cluster.gate import Gate
from tests.cluster.private_postgres import PrivatePostgres
from tests.cluster.processes import HUNG, reserved_ports, wait_until
from tests.cluster.studying import SEEDS_ONLY, STUDY, answer, front_of, ledger, only_error, ssm_mp, study_of
from tests.search.run import claiming
from tests.search.run.claiming import Bench, measured, seeds

Front = dict[str, studying.Values]


@pytest.fixture(autouse=True)
def _password(postgres: PrivatePostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def front_alone(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """The front of the study in one process, on SQLite."""
    folder = tmp_path_factory.mktemp("alone")
    studying.write_seeded_study(folder)
    done = ssm_mp("search", STUDY, cwd=folder)
    assert "certifying" in done.stderr
    assert (studying.run_of(folder) / "study.db").exists()
    return front_of(folder)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate that the trials of workers wait at which are started with it."""
    return Gate.at(tmp_path / "gate")


@pytest.fixture
def folder(postgres: PrivatePostgres, tmp_path: Path) -> Path:
    """A folder with a study that keeps its trials on the server."""
    storage = f'[storage]\nkind = "postgresql"\nurl = "{postgres.url}"\n'
    studying.write_seeded_study(tmp_path, extra=storage)
    return tmp_path


class Crew:
    """Workers of one study, and what it looks like meanwhile."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *options: str) -> None:
        self._folder, self._environment, self._options = folder, environment, options
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def log(self) -> Path:
        return self._folder / "workers.log"

    def start(self, number: int = 1) -> None:
        for _ in range(number):
            self.processes.append(
                studying.started(
                    "worker", STUDY, *self._options, cwd=self._folder, log=self.log, environment=self._environment
                )
            )

    def alive(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def opened(self) -> OpenStudy:
        run = studying.run_of(self._folder)
        wait_until((run / "storage.json").exists, self.logged)
        choice = stored_choice(run)
        assert choice is not None
        return connect(choice, run, lambda line: None)

    def until(self, opened: OpenStudy, finished: int) -> None:
        """Wait for so many finished trials."""
        wait_until(lambda: opened.patiently(lambda: counts(opened.study)).finished >= finished, self.logged, every=0.05)

    def until_away(self, times: int) -> None:
        """Wait until workers have said so often that the database is away."""
        wait_until(lambda: self.logged().count("the database is away") >= times, self.logged)

    def done(self) -> None:
        """Wait for all workers that live; they must end well."""
        for process in self.alive():
            assert process.wait(HUNG) == 0, self.logged()

    def logged(self) -> str:
        return self.log.read_text() if self.log.exists() else "nothing was logged"


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody else takes while the test lasts."""
    with reserved_ports(1) as (found,):
        yield found


@contextmanager
def crew(folder: Path, postgres: PrivatePostgres, *options: str, gate: Gate | None = None) -> Iterator[Crew]:
    """Workers that are gone at the end; their trials wait at the gate, where there is one."""
    held = Crew(folder, {**postgres.environment, **(gate.environment if gate else {})}, *options)
    try:
        yield held
    finally:
        for process in held.processes:
            process.kill()
            process.wait()


def require_exact(folder: Path, asked: int = SEEDS_ONLY) -> dict[str, int]:
    """Exactly so many trials, none lost, doubled or left running; why others failed."""
    found = ledger(study_of(folder))
    assert (found.finished, found.lost, found.doubled, found.running) == (asked, 0, 0, 0), found
    assert "unexplained" not in found.reasons
    return dict(found.reasons)


def holding(folder: Path, secret: str) -> list[str]:
    """Files below a folder that hold a text."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_workers_behind_a_proxy_finish_exactly_and_wait_for_it_when_it_restarts(
    postgres: PrivatePostgres, tmp_path: Path, gate: Gate, front_alone: Front, port: int
) -> None:
    storage = f'[storage]\nkind = "postgresql"\nurl = "{postgres.url}"\nproxy = "localhost:{port}"\n'
    studying.write_seeded_study(tmp_path, extra=storage)

    def serve() -> subprocess.Popen[bytes]:
        return studying.started(
            "proxy", STUDY, "--port", port, cwd=tmp_path, log=tmp_path / "proxy.log", environment=postgres.environment
        )

    with crew(tmp_path, postgres, gate=gate) as workers:
        workers.start(4)  # before the proxy: they wait for it, and it must not wait for them
        proxy = serve()
        try:
            gate.admit(5)
            wait_until(lambda: gate.admitted() == 5, workers.logged)
            gate.wait_for(4, workers.logged)
            proxy.kill()
            proxy.wait()
            gate.open()
            workers.until_away(4)
            proxy = serve()
            workers.done()
        finally:
            proxy.kill()
            proxy.wait()
    require_exact(tmp_path)
    assert front_of(tmp_path) == front_alone


@pytest.mark.parametrize(("workers", "sampler"), [(3, "front"), (8, "front"), (8, "nsga2"), (8, "tpe"), (8, "random")])
def test_workers_that_do_nothing_but_claim_finish_exactly_n_different_maps(
    postgres: PrivatePostgres, tmp_path: Path, workers: int, sampler: str
) -> None:
    bench = Bench.at(tmp_path, "postgresql", postgres.url, sampler)
    bench.work_together(workers, 41, seeds(5))
    maps = {map_key(one) for one in bench.require_whole(41)}
    bench.close()
    assert {map_key(seed.params) for seed in seeds(5)} <= maps


def test_a_worker_killed_before_any_of_its_writes_costs_nothing(postgres: PrivatePostgres, tmp_path: Path) -> None:
    found = claiming.every_death(
        lambda place: Bench.at(place, "postgresql", postgres.url), tmp_path, asked=2, queued=seeds(4)
    )
    assert found == {frozenset(map_key(seed.params) for seed in seeds(2))}


@pytest.mark.filterwarnings("ignore:The constraint value is ignored")  # it is set already: by the call that failed
def test_an_answer_that_was_lost_after_the_operation_is_repaired(
    postgres: PrivatePostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.trials.storage.time", claiming.IMPATIENT)
    claiming.every_lost_answer(
        lambda place: Bench.at(place, "postgresql", postgres.url), tmp_path, asked=2, queued=seeds(1)
    )


@pytest.mark.filterwarnings("ignore:The constraint value is ignored")
def test_restarts_while_workers_do_nothing_but_claim_neither_lose_nor_double_a_map(
    postgres: PrivatePostgres, tmp_path: Path
) -> None:
    bench = Bench.at(tmp_path, "postgresql", postgres.url)
    failures: list[BaseException] = []
    permits, arrived = threading.Semaphore(0), threading.Semaphore(0)

    def permitted(task: Task) -> Measured:
        arrived.release()
        permits.acquire()
        return measured(task.params)

    def one() -> None:
        try:
            bench.work(100, seeds(9), evaluate=permitted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert arrived.acquire(timeout=HUNG), failures
        for _ in range(5):
            permits.release(15)  # fewer in all than would finish the study
            time.sleep(random.uniform(0.0, 0.5))
            postgres.restart("immediate")
        assert all(thread.is_alive() for thread in threads), failures
    finally:
        permits.release(1000)
        for thread in threads:
            thread.join()
    assert failures == []
    bench.require_whole(100)
    bench.close()


def test_eight_workers_find_the_front_that_one_process_finds_on_sqlite(
    postgres: PrivatePostgres, folder: Path, front_alone: Front
) -> None:
    with crew(folder, postgres) as workers:
        workers.start(8)
        workers.done()
    assert require_exact(folder) == {}
    assert front_of(folder) == front_alone


def test_ten_kills_at_random_moments_change_nothing(
    postgres: PrivatePostgres, folder: Path, gate: Gate, front_alone: Front
) -> None:
    chosen = random.Random(4)
    with crew(folder, postgres, gate=gate) as workers:
        workers.start(4)
        for kills in range(10):
            # the first has a trial in hand, the others whatever they have
            held = gate.wait_for(1, workers.logged) if kills == 0 else [process.pid for process in workers.alive()]
            victim = chosen.choice([process for process in workers.alive() if process.pid in held])
            victim.kill()
            assert victim.wait() == -signal.SIGKILL
            workers.start()
            gate.admit(chosen.randint(0, 3))  # fewer in all than would finish the study
            time.sleep(chosen.uniform(0.1, 0.7))
        gate.open()
        workers.done()
    reasons = require_exact(folder)
    assert set(reasons) == {LOST}
    assert front_of(folder) == front_alone


def test_restarts_of_the_server_and_its_absence_change_nothing(
    postgres: PrivatePostgres, folder: Path, gate: Gate, front_alone: Front
) -> None:
    with crew(folder, postgres, gate=gate) as workers:
        workers.start(4)
        opened = workers.opened()
        for finished in (2, 10, 18):
            gate.admit(8)
            workers.until(opened, finished)  # and up to six more are under way
            postgres.restart("immediate")
        wait_until(lambda: gate.admitted() == 24, workers.logged)
        gate.wait_for(4, workers.logged)  # nobody is waiting for the server any more
        before = workers.logged().count("the database is away")
        postgres.stop("immediate")
        gate.open()
        workers.until_away(before + 4)
        assert len(workers.alive()) == 4, workers.logged()
        postgres.start()
        workers.done()
        assert "Traceback" not in workers.logged()
        assert postgres.password not in workers.logged()
    require_exact(folder)
    assert front_of(folder) == front_alone


def test_a_worker_gives_back_and_a_search_with_four_goes_on_to_the_report(
    postgres: PrivatePostgres, folder: Path, gate: Gate
) -> None:
    options = ("--set", "search.seeds=10", "--set", "search.sampler=tpe")
    gate.admit(1)
    with crew(folder, postgres, *options, gate=gate) as workers:
        workers.start()
        opened = workers.opened()
        workers.until(opened, 1)
        gate.wait_for(1, workers.logged)
        workers.processes[0].terminate()
        assert workers.processes[0].wait(HUNG) == 143
    standing = answer("status", STUDY, *options, cwd=folder, environment=postgres.environment)
    assert (standing["finished"], standing["running"]) == (1, [])
    assert standing["reasons"] == {"given back on SIGTERM, and tried again": 1}
    done = ssm_mp("search", STUDY, "--workers", 4, *options, cwd=folder, environment=postgres.environment)
    assert (studying.run_of(folder) / "report.md").exists(), done.stderr
    assert require_exact(folder) == standing["reasons"]
    sampled = [trial for trial in studying.trials_of(folder) if trial.user_attrs["origin"] == "tpe"]
    assert len(sampled) > 20
    shown = ssm_mp("status", STUDY, *options, cwd=folder, environment=postgres.environment)
    assert "41 of 41 finished" in shown.stdout
    assert holding(folder, postgres.password) == []
    assert postgres.password not in done.stdout + done.stderr + shown.stdout + shown.stderr
    assert holding(folder, postgres.url)  # the search above could have found it


def test_a_password_comes_from_a_pgpass_file_too(
    postgres: PrivatePostgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgpass = folder.parent / f"{folder.name}.pgpass"
    pgpass.write_text(f"127.0.0.1:{postgres.port}:*:*:{postgres.password}\n")
    pgpass.chmod(0o600)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(pgpass))
    done = ssm_mp(
        "worker", STUDY, "--set", "search.trials=2", cwd=folder, environment={"PGPASSFILE": str(pgpass)}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    require_exact(folder, 2)
    assert holding(folder, postgres.password) == []


def test_a_study_whose_space_has_grown_goes_on_with_its_trials(postgres: PrivatePostgres, tmp_path: Path) -> None:
    """By its database's own lock; a move that was killed at any write before is made again."""
    bench = Bench.at(tmp_path, "postgresql", postgres.url)
    bench.work(6, seeds(4))
    before = {name: list(choices) for name, choices in claiming.SPACE.items()}
    now = {name: [*choices, "nf4"] for name, choices in before.items()}
    first = bench.opened()
    trials = [(t.number, t.state, t.values, map_of(t)) for t in first.study.get_trials()]
    for fatal in (1, 4, 9):
        deadly = claiming.Deadly(storage_of(first.study), fatal)
        with pytest.raises(claiming.Killed):
            move_study(claiming.through(bench.opened(), deadly), bench.run, before, now)
    move_study(bench.opened(), bench.run, before, now)
    choice = stored_choice(bench.run)
    assert choice is not None
    moved = connect(choice, bench.run, lambda line: None)
    assert [(t.number, t.state, t.values, map_of(t)) for t in moved.study.get_trials()] == trials
    assert moved.study.study_name == f"{choice.study}, space 2"
    with pytest.raises(StudyError, match="has just grown"):
        begin(first, [], claiming.SPACE, 9, claiming.BUDGET)
    moved.close()
    bench.close()


@pytest.mark.parametrize("command", ["worker", "search"])
@pytest.mark.parametrize("password", ["it-is-another-one", None])
def test_a_wrong_or_missing_password_is_one_clear_error(folder: Path, command: str, password: str | None) -> None:
    environment = {"PGPASSFILE": str(folder / "absent")} | ({"PGPASSWORD": password} if password else {})
    done = ssm_mp(command, STUDY, cwd=folder, environment=environment)
    assert done.returncode == 3, done.stderr
    assert "trying for" not in done.stderr  # such an answer is not waited on
    error = only_error(done.stderr)
    assert "PGPASSWORD" in error
    assert "pgpass" in error
    assert "it-is-another-one" not in error


def test_a_wrong_address_is_one_clear_error(postgres: PrivatePostgres, folder: Path, port: int) -> None:
    elsewhere = postgres.url.replace(f":{postgres.port}/", f":{port}/")
    absent = postgres.url.removesuffix("search") + "absent"
    for url, what in ((elsewhere, "refused"), (absent, "does not exist")):
        options = ("--run-dir", f"run-{what[:4]}", "--set", f"storage.url={url}")
        done = ssm_mp("worker", STUDY, *options, cwd=folder, environment=postgres.environment)
        assert done.returncode == 3, done.stderr
        error = studying.only_error(done.stderr)
        assert what in error
        assert "[storage] url" in error
        assert postgres.password not in done.stderr
