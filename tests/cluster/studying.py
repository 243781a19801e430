"""Studies of a tiny model for the cluster tests: written, searched by real processes, and counted afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.front import pareto_front
from search.problem.run_directory import RunDirectory
from search.problem.spec import SAMPLERS
from search.run.claim import LOST
from search.trials.attributes import FINISHED, MEASURED, ORIGIN, OWNER, REASON
from search.trials.maps import map_key, map_of
from search.trials.owner import Owner, owner_from_json
from search.trials.read_back import asked_trials, points
from search.trials.storage import exists, read_study
from tests.cluster.processes import HUNG
from tests.tiny import LENGTH, repetitive_tokens, write_study

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "search.cli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STUDY = "tiny.toml"
CERTIFY_WINDOWS = 64
BUDGET_PERCENT = 30.0
SEEDS_ONLY = 41
"""As many trials as this all come from seeds: what is found does not depend on who evaluates what, and when."""


def write_seeded_study(
    folder: Path, *, windows: int = 512, trials: int = SEEDS_ONLY, search: str = "", extra: str = ""
) -> Path:
    """A study that has more than 41 seeds; returns its file. How long its trials last is of no account: see `Gate`.

    search: more lines of its table `[search]`; extra: more tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = f"""
[precision]
choices = ["fp16", "int8", "int3"]
[search]
racing = false
probe = "none"
budget_percent = {BUDGET_PERCENT}
seeds = 60
trials = {trials}
{search}
{extra}
"""
    study = write_study(folder, windows=(4, windows, CERTIFY_WINDOWS), extra=tables)
    # twice as many as are drawn: some are equal, and count once
    np.save(folder / "tokens.npy", repetitive_tokens(2 * LENGTH * (4 + windows + CERTIFY_WINDOWS)))
    return study


def ssm_mp(
    *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = HUNG
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end. environment: variables besides `ENVIRONMENT`."""
    command = [*COMMAND, *map(str, arguments)]
    own = {**ENVIRONMENT, **(environment or {})}
    return subprocess.run(
        command, cwd=cwd, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def answer(*arguments: object, cwd: Path, environment: Mapping[str, str] | None = None, code: int = 0) -> Any:
    """The JSON answer of a command that ends with `code`."""
    done = ssm_mp(*arguments, "--json", cwd=cwd, environment=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object, cwd: Path, environment: Mapping[str, str] | None = None, code: int = 2) -> str:
    """The only error line of a command that fails as it should."""
    done = ssm_mp(*arguments, cwd=cwd, environment=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return only_error(done.stderr)


def only_error(text: str) -> str:
    """The one line of an output or log that begins with `error:`; there is no traceback either."""
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    return errors[0]


def started(
    *arguments: object, cwd: Path, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command of ours in the background; what it prints is appended to `log`."""
    own = {**ENVIRONMENT, **(environment or {})}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=cwd, env=own, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


@contextmanager
def running(
    *arguments: object, cwd: Path, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours in the background, in a process group of its own, of which nothing is left at the end.

    log: what it prints is appended to this file.
    """
    own = {**ENVIRONMENT, **(environment or {})}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=cwd, env=own, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_of(folder: Path) -> RunDirectory:
    """The run directory of the study in a folder."""
    return RunDirectory(folder / "runs" / Path(STUDY).stem)


def study_of(folder: Path) -> Study | None:
    """The trials of the study in a folder; None before there are any. Makes nothing by looking."""
    run = run_of(folder)
    return read_study(run) if (run / "study.json").exists() and exists(run) else None


def trials_of(folder: Path) -> list[FrozenTrial]:
    """All trials of the study in a folder, none where it has not begun."""
    study = study_of(folder)
    return [] if study is None else study.get_trials(deepcopy=False)


def finished_count(folder: Path) -> int:
    """How many trials are finished."""
    return sum(trial.state in FINISHED for trial in trials_of(folder))


def running_owners(folder: Path) -> list[Owner]:
    """The owners of the trials that are running at this moment."""
    running = (trial for trial in trials_of(folder) if trial.state == TrialState.RUNNING)
    return [owner_from_json(trial.user_attrs[OWNER]) for trial in running if OWNER in trial.user_attrs]


@dataclass(frozen=True)
class Ledger:
    """What became of the trials asked for. doubled: maps that finished more than once; lost: asked and not finished.

    reasons: of the failed trials; a trial that failed without one counts as "unexplained".
    """

    asked: int
    finished: int
    lost: int
    doubled: int
    running: int
    reasons: Mapping[str, int]

    @property
    def interrupted(self) -> int:
        """How many trials lost their worker and were taken over by another."""
        return self.reasons.get(LOST, 0)

    @property
    def given_back(self) -> int:
        """How many trials were given back by a worker that a signal stopped."""
        return sum(count for reason, count in self.reasons.items() if reason.startswith("given back on SIG"))


def ledger(study: Study | None) -> Ledger:
    """Count the trials of a study."""
    assert study is not None, "expected a study that has begun, found none"
    trials = study.get_trials(deepcopy=False)
    finished = Counter(map_key(map_of(trial)) for trial in trials if trial.state in FINISHED)
    failed = (trial for trial in trials if trial.state == TrialState.FAIL)
    asked = asked_trials(study, 0)
    return Ledger(
        asked=asked,
        finished=finished.total(),
        lost=asked - finished.total(),
        doubled=sum(count > 1 for count in finished.values()),
        running=sum(trial.state == TrialState.RUNNING for trial in trials),
        reasons=Counter(str(trial.user_attrs.get(REASON, "unexplained")) for trial in failed),
    )


def require_exact(folder: Path, asked: int) -> Ledger:
    """The ledger of a study that has exactly the trials asked for, whatever became of its workers."""
    found = ledger(study_of(folder))
    expected = (asked, asked, 0, 0, 0)
    assert (found.asked, found.finished, found.lost, found.doubled, found.running) == expected, found
    assert not {"unexplained", "unknown"} & found.reasons.keys(), found
    explained = found.interrupted + found.given_back
    assert explained == sum(found.reasons.values()), found
    return found


Values = tuple[float, float, float]
"""Compression, perplexity, increase in percent: exactly as they were measured."""


def measurements(folder: Path) -> dict[str, Values]:
    """Every finished map of a study with its values. Only where all came from seeds: sampled ones may differ."""
    trials = [trial for trial in trials_of(folder) if trial.state in FINISHED]
    sampled = [trial.number for trial in trials if trial.user_attrs[ORIGIN] in SAMPLERS]
    assert not sampled, f"expected seeds only, found proposals of a sampler: {sampled}"
    return {map_key(map_of(trial)): _values(trial.user_attrs[MEASURED]) for trial in trials}


def front_of(folder: Path) -> dict[str, Values]:
    """The maps of a study's front, with their values."""
    study = study_of(folder)
    assert study is not None
    front = pareto_front(points(study, run_of(folder).space()), BUDGET_PERCENT)
    return {map_key(point.map): (point.compression, point.perplexity, point.increase_percent) for point in front}


@dataclass(frozen=True)
class Undisturbed:
    """What one process finds that nobody disturbs."""

    measurements: Mapping[str, Values]
    front: Mapping[str, Values]


@cache
def undisturbed() -> Undisturbed:
    """The study of `write_seeded_study` with its defaults, searched by one process; once in a test run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_seeded_study(folder)
        assert answer("search", STUDY, cwd=folder)["trials"] == SEEDS_ONLY
        return Undisturbed(measurements(folder), front_of(folder))


def require_same_as_undisturbed(folder: Path) -> None:
    """The same maps with the same values, and the same front, to the last bit."""
    expected = undisturbed()
    assert measurements(folder) == expected.measurements
    assert front_of(folder) == expected.front


def _values(measured: Mapping[str, Any]) -> Values:
    return measured["compression"], measured["perplexity"], measured["increase_percent"]
