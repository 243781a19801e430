"""Trials wait at the gate in whatever process they are, and pass one by one or all together."""

from __future__ import annotations

import signal
from pathlib import Path

from search.run.claim import LOST
from tests.cluster.gate import Gate
from tests.cluster.processes import HUNG, wait_until
from tests.cluster.studying import STUDY, finished_count, ledger, running_owners, started, study_of, write_seeded_study


def test_trials_wait_until_they_are_let_through(tmp_path: Path) -> None:
    write_seeded_study(tmp_path, trials=8)
    gate, log = Gate.at(tmp_path / "gate"), tmp_path / "log"
    working = [started("worker", STUDY, cwd=tmp_path, log=log, environment=gate.environment) for _ in range(2)]
    try:
        pids = gate.wait_for(2, log.read_text)
        assert pids == sorted(process.pid for process in working)
        assert {owner.pid for owner in running_owners(tmp_path)} == set(pids)
        assert finished_count(tmp_path) == 0
        gate.admit(3)
        gate.admit(2)
        wait_until(lambda: finished_count(tmp_path) == 5, log.read_text)
        assert gate.wait_for(2, log.read_text) == pids
        working[0].send_signal(signal.SIGTERM)
        assert working[0].wait(HUNG) == 143
        assert gate.standing() == [working[1].pid]
        working[1].kill()
        working[1].wait()
        assert gate.standing() == []
        assert finished_count(tmp_path) == 5
        gate.open()
        working.append(started("worker", STUDY, cwd=tmp_path, log=log, environment=gate.environment))
        assert working[2].wait(HUNG) == 0
    finally:
        for process in working:
            process.kill()
            process.wait()
    found = ledger(study_of(tmp_path))
    assert (found.finished, found.running) == (8, 0)
    assert found.reasons == {"given back on SIGTERM, and tried again": 1, LOST: 1}
