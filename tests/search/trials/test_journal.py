"""The journal file: whole lines whatever was half written, a full folder waited for, killed holders of its lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage

from search.base.file_lock import FileLock
from search.problem.run_directory import RunDirectory
from search.trials.journal import Journal
from search.trials.read_back import counts
from search.trials.storage import read_study
from ssm_mp.errors import MachineError
from tests.cluster.gate import Gate
from tests.cluster.processes import HUNG, wait_until
from tests.cluster.studying import running
from tests.tiny import LENGTH, repetitive_tokens, write_study

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL_BYTES = 2 * 1024**2
LONG = {"text": "x" * 5000}
"""A line longer than a page of memory, so that a full disk takes only its beginning."""


def journal(folder: Path, said: list[str] | None = None, patience: float = 60.0) -> Journal:
    """One process's view of the journal in a folder; the lock lies beside the folder, as does a run's."""
    say = (said if said is not None else []).append
    return Journal(folder / "study.journal", FileLock(folder.parent / "lock"), say, patience)


def lines_of(folder: Path) -> list[Any]:
    """What the file holds, which must be whole lines only."""
    content = (folder / "study.journal").read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, enough for a run of the tiny model."""
    made = tmp_path / "small"
    made.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(made)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield made
    finally:
        subprocess.run(["umount", "--lazy", made], check=True)


def fill(folder: Path) -> Path:
    """Take all room of a small file system; returns the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(folder).free == 0
    return filler


def test_a_half_written_last_line_is_cut_off_by_whoever_writes_next(folder: Path) -> None:
    writer, reader = journal(folder), journal(folder)
    writer.append_logs([{"n": 0}, {"n": 1}])
    assert list(reader.read_logs(0)) == [{"n": 0}, {"n": 1}]
    with (folder / "study.journal").open("ab") as file:
        file.write(b'{"n": 2, "half')
    assert list(reader.read_logs(2)) == []
    writer.append_logs([{"n": 3}])
    assert list(reader.read_logs(2)) == [{"n": 3}]
    assert lines_of(folder) == [{"n": 0}, {"n": 1}, {"n": 3}]


def test_a_study_goes_on_after_every_write_was_followed_by_half_a_line(folder: Path) -> None:
    first = optuna.create_study(storage=JournalStorage(journal(folder)), study_name="s")
    second = optuna.load_study(storage=JournalStorage(journal(folder)), study_name="s")
    for number in range(6):
        trial = (first, second)[number % 2].ask()
        with (folder / "study.journal").open("ab") as file:
            file.write(b'{"op_code": 5, "worker_id": "killed", "trial')
        trial.suggest_float("x", 0, 1)
        (first, second)[number % 2].tell(trial, float(number))
    for study in (first, second):
        assert [trial.value for trial in study.get_trials()] == [0, 1, 2, 3, 4, 5]


@given(st.data())
def test_wherever_the_last_line_is_cut_exactly_the_whole_lines_are_left(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    folder.mkdir()
    writers, path = [journal(folder), journal(folder)], folder / "study.journal"
    expected: list[dict[str, str]] = []
    # some lines are longer than the blocks in which the end is looked for
    texts = st.one_of(st.text(max_size=5), st.sampled_from(["y" * 4095, "z" * 9000]))
    for _ in range(data.draw(st.integers(1, 5))):
        lines = [{"t": text} for text in data.draw(st.lists(texts, min_size=1, max_size=3))]
        data.draw(st.sampled_from(writers)).append_logs(lines)
        expected += lines
        last = len(path.read_bytes().splitlines(keepends=True)[-1])
        cut = data.draw(st.one_of(st.just(0), st.integers(1, last)))
        if cut:
            os.truncate(path, path.stat().st_size - cut)
            expected.pop()
        assert list(journal(folder).read_logs(0)) == expected
    writers[0].append_logs([{"t": "end"}])
    assert lines_of(folder) == [*expected, {"t": "end"}]
    assert list(writers[1].read_logs(0)) == lines_of(folder)


def test_what_is_appended_together_is_one_piece_or_nothing(folder: Path) -> None:
    writer = journal(folder)
    with writer.together():
        writer.append_logs([{"n": 0}])
        writer.append_logs([{"n": 1}])
        assert lines_of(folder) == []
    assert lines_of(folder) == [{"n": 0}, {"n": 1}]
    with contextlib.suppress(KeyError), writer.together():
        writer.append_logs([{"n": 2}])
        raise KeyError
    writer.append_logs([{"n": 3}])
    assert lines_of(folder) == [{"n": 0}, {"n": 1}, {"n": 3}]


def test_what_an_append_has_not_finished_is_not_read(folder: Path) -> None:
    journal(folder).append_logs([{"n": 0}])
    seen: list[Any] = []
    asked = threading.Event()

    class Asked(FileLock):
        @contextlib.contextmanager
        def held(self) -> Iterator[None]:
            asked.set()
            with super().held():
                yield

    reading = Journal(folder / "study.journal", Asked(folder.parent / "lock"), seen.append)
    reader = threading.Thread(target=lambda: seen.append(list(reading.read_logs(0))))
    with FileLock(folder.parent / "lock").held():
        with (folder / "study.journal").open("ab") as file:
            file.write(b'{"n": 1}\n{"n": 2}\n{"n"')
        reader.start()
        assert asked.wait(HUNG), "expected a reader to wait for the lock"
        assert seen == []
        os.truncate(folder / "study.journal", len('{"n":0}\n'))  # as where the disk is full in the middle
    reader.join(HUNG)
    assert seen == [[{"n": 0}]]


def test_a_killed_holder_of_the_lock_makes_nobody_wait(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from search.base.file_lock import FileLock\n"
        "with FileLock(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(folder.parent / "lock")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with FileLock(folder.parent / "lock").tried() as got:
            assert not got
        holder.kill()
        holder.wait()
    with FileLock(folder.parent / "lock").tried() as got:
        assert got  # for Optuna's own lock one would have to wait until 30 s are over
    journal(folder).append_logs([{"n": 0}])
    assert lines_of(folder) == [{"n": 0}]


def test_a_full_folder_is_waited_for_and_said_once(small: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        filler.unlink()  # now that somebody waits for it

    writer = Journal(small / "study.journal", FileLock(small.parent / "lock"), say, 60.0)
    writer.append_logs([{"n": 0}])
    filler = fill(small)
    writer.append_logs([LONG, {"n": 1}])
    assert lines_of(small) == [{"n": 0}, LONG, {"n": 1}]
    assert said == [f"{small / 'study.journal'}: No space left on device; waiting for up to 60 s"]


def test_out_of_patience_with_a_full_folder_whole_lines_are_left_and_the_error_says_what_to_do(small: Path) -> None:
    writer = journal(small, patience=0.5)
    writer.append_logs([{"n": 0}])
    filler = fill(small)
    with pytest.raises(MachineError, match=r"study\.journal: the journal cannot be written \(No space left"):
        writer.append_logs([LONG, {"n": 1}])
    assert lines_of(small) == [{"n": 0}]
    filler.unlink()
    writer.append_logs([{"n": 2}])
    assert lines_of(small) == [{"n": 0}, {"n": 2}]


def test_a_folder_that_cannot_be_written_for_good_is_not_waited_for(folder: Path) -> None:
    said: list[str] = []
    writer = journal(folder, said)
    (folder / "study.journal").unlink()
    (folder / "study.journal").mkdir()
    with pytest.raises(MachineError, match="Is a directory"):
        writer.append_logs([{"n": 0}])
    assert said == []


def finished(run: RunDirectory) -> int:
    """How many trials of a run are finished."""
    return counts(read_study(run)).finished


def logs_of(run: RunDirectory) -> str:
    """What the workers of a run wrote."""
    return "\n".join(log.read_text() for log in (run / "logs").glob("*.log"))


@pytest.mark.slow
def test_two_workers_in_a_folder_that_is_full_for_a_while_finish_exactly(tmp_path: Path, small: Path) -> None:
    extra = '[search]\nracing = false\nprobe = "none"\nseeds = 20\ntrials = 16\nbudget_percent = 20\n'
    write_study(tmp_path, windows=(4, 256, 64), extra=extra)
    np.save(tmp_path / "tokens.npy", repetitive_tokens(2 * LENGTH * (4 + 256 + 64)))
    run = RunDirectory(small / "run")
    gate, log = Gate.at(tmp_path / "gate"), tmp_path / "search.log"
    gate.admit(2)
    command = ("search", "tiny.toml", "--workers", 2, "--run-dir", run.path)
    with running(*command, cwd=tmp_path, log=log, environment=gate.environment) as search:
        wait_until(lambda: (run / "study.journal").exists() and finished(run) == 2, lambda: logs_of(run))
        gate.wait_for(2, lambda: logs_of(run))
        filler = fill(small)
        gate.open()
        wait_until(lambda: "No space left" in logs_of(run), lambda: logs_of(run))
        filler.unlink()
        assert search.wait(HUNG) in (0, 1), log.read_text()  # 1: where no map is certified
    found = counts(read_study(run))
    assert (found.finished, found.running, found.failed) == (16, 0, 0)
    assert "Traceback" not in logs_of(run)
