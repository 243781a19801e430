"""The loop of a worker, and several worker processes on one machine."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import Trial

from search.base.stop import Stop
from search.measure.objective import Measured
from search.run.claim import LOST, claim, enqueue
from search.run.worker_loop import Task, take_over_lost
from search.trials.attributes import FINISHED
from search.trials.maps import map_key
from search.trials.owner import LEASES, Owner, lease
from search.trials.read_back import counts
from tests.cluster import studying
from tests.cluster.gate import Gate
from tests.cluster.processes import HUNG, of_directory, wait_until
from tests.cluster.studying import SEEDS_ONLY, STUDY, front_of, refused, require_exact, running, ssm_mp
from tests.search.run.claiming import BUDGET, SPACE, Bench, evaluated, measured, seeds

OTHER = Owner("other", "elsewhere", "elsewhere", 1)


@pytest.mark.parametrize("sampler", ["front", "random"])
def test_seeds_race_against_nobody_and_proposals_against_all_maps_with_all_windows(
    tmp_path: Path, sampler: str
) -> None:
    bench = Bench.at(tmp_path, "journal", sampler=sampler)
    rivals: list[int] = []

    def stopping_every_third(task: Task) -> Measured:
        rivals.append(len(task.rivals))
        full = measured(task.params)
        return replace(full, stopped="dominated") if len(rivals) % 3 == 0 else full

    bench.work(9, seeds(4), evaluate=stopping_every_third)
    assert rivals == [0, 0, 0, 0, 3, 4, 4, 5, 6]


def test_a_signal_in_the_middle_of_a_trial_gives_it_back(tmp_path: Path) -> None:
    bench, stop = Bench.at(tmp_path, "journal"), Stop()

    def signalled(task: Task) -> Measured:
        stop.signal = signal.SIGUSR1
        stop.check()
        return measured(task.params)

    assert bench.work(3, seeds(5), evaluate=signalled, stop=stop) == "stopped"
    found = counts(bench.opened().study)
    assert (found.running, found.waiting, found.finished) == (0, 5, 0)
    assert found.reasons == {"given back on SIGUSR1, and tried again": 1}
    bench.work(3, seeds(5))
    assert {map_key(one) for one in bench.require_whole(3)} == {map_key(seed.params) for seed in seeds(3)}


def test_a_signal_before_the_first_trial_claims_none(tmp_path: Path) -> None:
    bench, stop = Bench.at(tmp_path, "journal"), Stop()
    stop.signal = signal.SIGTERM
    assert bench.work(3, seeds(2), stop=stop) == "stopped"
    assert [trial.number for trial in bench.opened().study.trials] == [0, 1]
    assert counts(bench.opened().study).waiting == 2


def test_a_waiting_worker_takes_over_the_last_trial_when_its_owner_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.run.worker_loop._SEARCH_EVERY", 0.1)
    monkeypatch.setattr("search.run.worker_loop._LOOK_EVERY", 0.05)
    searches: list[int] = []

    def searched(*arguments: Any) -> int:
        searches.append(take_over_lost(*arguments))
        return searches[-1]

    monkeypatch.setattr("search.run.worker_loop.take_over_lost", searched)
    bench = Bench.at(tmp_path, "journal")
    opened, said = bench.opened(), list[str]()
    enqueue(opened.study, seeds(2), SPACE)
    with lease(bench.run / LEASES, OTHER):
        assert isinstance(claim(opened, SPACE, OTHER, 2, "random"), Trial)
        thread = threading.Thread(target=lambda: bench.work(2, said=said.append))
        thread.start()
        wait_until(lambda: counts(opened.study).finished == 1, lambda: str(counts(opened.study)), every=0.02)
        already = len(searches)
        wait_until(lambda: len(searches) >= already + 3, lambda: str(searches), every=0.02)
        assert set(searches) == {0}  # the owner is alive
        assert counts(opened.study).running == 1
    thread.join(HUNG)
    assert {map_key(one) for one in bench.require_whole(2)} == {map_key(seed.params) for seed in seeds(2)}
    assert counts(opened.study).reasons == {LOST: 1}
    assert said == [
        "the last trials are being evaluated by other workers; waiting for them",
        "1 interrupted trial will be tried again",
    ]


def test_a_worker_whose_trial_was_taken_over_says_so_and_goes_on(tmp_path: Path) -> None:
    bench, said, tasks = Bench.at(tmp_path, "journal"), list[str](), list[Task]()

    def declared_dead(task: Task) -> Measured:
        tasks.append(task)
        if len(tasks) == 1:  # its lease is gone, as on a machine that the others cannot see
            for path in (bench.run / LEASES).iterdir():
                path.unlink()
            bench.work(3, seeds(2))
        return measured(task.params)

    assert bench.work(3, seeds(2), evaluate=declared_dead, said=said.append) == "finished"
    bench.require_whole(3)
    assert said == ["trial 0 was taken over by another worker meanwhile; its result is not used"]


def test_a_study_that_is_continued_with_more_trials_keeps_what_it_has(tmp_path: Path) -> None:
    bench = Bench.at(tmp_path, "journal")
    bench.work(4, seeds(2))
    before = [trial.params for trial in bench.opened().study.trials]
    bench.work_together(3, 12, seeds(2))
    bench.require_whole(12)
    assert [trial.params for trial in bench.opened().study.trials[:4]] == before


def test_what_a_map_measured_is_written_as_it_was(tmp_path: Path) -> None:
    bench = Bench.at(tmp_path, "journal")
    bench.work(5, seeds(5), evaluate=evaluated)
    for trial in bench.opened().study.get_trials(states=FINISHED):
        exact = measured(trial.params)
        assert trial.values == [exact.compression, exact.increase.percent]
        assert trial.user_attrs["measured"]["bytes"] == exact.bytes
        assert trial.constraints == {"budget": exact.increase.percent - BUDGET}


@pytest.mark.slow
def test_eight_processes_find_the_front_that_one_process_finds(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        studying.write_seeded_study(folder)
    ssm_mp("search", STUDY, cwd=alone)
    gate, log = Gate.at(tmp_path / "gate"), tmp_path / "search.log"
    with running("search", STUDY, "--workers", 8, cwd=together, log=log, environment=gate.environment) as process:
        pids = gate.wait_for(8, log.read_text)  # or one might be done before the others begin
        gate.open()
        assert process.wait(HUNG) == 0, log.read_text()
    run = studying.run_of(together)
    assert (run / "report.md").exists(), log.read_text()
    assert (run / "study.journal").exists()
    assert list((run / LEASES).iterdir()) == []
    for folder in (alone, together):
        assert not require_exact(folder, SEEDS_ONLY).reasons
    owners = {trial.user_attrs["owner"]["pid"] for trial in studying.trials_of(together) if "owner" in trial.user_attrs}
    assert owners == set(pids)
    assert front_of(together) == front_of(alone)
    assert (studying.run_of(alone) / "certificate.json").read_text() == (run / "certificate.json").read_text()


@pytest.mark.slow
def test_a_search_with_workers_that_is_interrupted_ends_them_and_continues(tmp_path: Path) -> None:
    studying.write_seeded_study(tmp_path)
    gate = Gate.at(tmp_path / "gate")
    for times, whole_group in enumerate((False, True), start=1):  # as `kill -INT` does, and as Ctrl-C does
        log = tmp_path / f"search {times}.log"
        gate.admit(2)
        with running("search", STUDY, "--workers", 3, cwd=tmp_path, log=log, environment=gate.environment) as process:
            wait_until(lambda wanted=2 * times: studying.finished_count(tmp_path) == wanted, log.read_text)  # type: ignore[misc]
            gate.wait_for(3, log.read_text)
            wait_until(lambda shown=log: "trials " in shown.read_text(), log.read_text)  # type: ignore[misc]
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
            assert process.wait(HUNG) == 130
        assert of_directory(tmp_path) == []
        assert studying.running_owners(tmp_path) == []
        assert studying.finished_count(tmp_path) == 2 * times
        assert "Traceback" not in log.read_text()
    ssm_mp("search", STUDY, "--workers", 3, cwd=tmp_path)
    assert require_exact(tmp_path, SEEDS_ONLY).given_back == 2 * 3
    assert (studying.run_of(tmp_path) / "report.md").exists()


@pytest.mark.slow
def test_sqlite_is_refused_for_several_processes(tmp_path: Path) -> None:
    studying.write_seeded_study(tmp_path, windows=32)
    for command in (("search", STUDY, "--workers", 2), ("worker", STUDY)):
        error = refused(*command, "--set", "storage.kind=sqlite", cwd=tmp_path)
        assert "SQLite is for one process" in error
        assert "14 of 120" in error
