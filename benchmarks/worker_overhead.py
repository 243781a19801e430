"""What a trial costs beside its evaluation: claim and tell, in worker processes whose objective is empty.

    python -m benchmarks.workers      # runs this for each storage and number of workers

Each worker is a process of its own: it claims a trial, reads its rivals where a real worker does, and tells made-up
figures at once. Nothing is evaluated, so the workers meet at the study's lock at every trial, which is the worst that
can happen there; waiting for the lock counts. As in the reference study there are 22 components and 128 windows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import Trial

from benchmarks.proposals import catalogue_of
from search.measure.objective import Measured
from search.problem.run_directory import RunDirectory
from search.problem.spec import SAMPLERS
from search.run.claim import Idle, claim, tell
from search.sampling.front_sampler import FrontSampler
from search.sampling.knowledge import before_any_trial
from search.sampling.sampler import Proposal
from search.sampling.unrepeated import Unrepeated
from search.trials.attributes import ORIGIN
from search.trials.maps import map_of
from search.trials.optuna_storage import stored
from search.trials.owner import Owner, this_process
from search.trials.read_back import finished_differences
from search.trials.storage import STORAGE, OpenStudy, StorageChoice, connect
from ssm_mp.evaluation.evaluate import Increase

ROOT = Path(__file__).parents[1]
COMPONENTS, WINDOWS = 22, 128
BUDGET_PERCENT = 5.0
_GO = "go"
_LOOK_EVERY = 0.005
T = TypeVar("T")


@dataclass(frozen=True)
class Spent:
    """Seconds of one trial: proposing (within the claim, outside of the lock), the whole claim, rivals, tell.

    proposals: how many it took, more than one where other workers were faster.
    """

    proposals: int
    proposal: float
    claim: float
    rivals: float
    tell: float


@dataclass(frozen=True)
class Overhead:
    """Milliseconds a trial over all trials of all workers, and trials a second of all workers together.

    ms: median of claim + tell, proposals included; mean and quartiles of the same; the other medians are of its parts.
    rivals_ms is spent besides, before the evaluation. proposals: mean number a trial.
    """

    ms: float
    mean_ms: float
    quartiles_ms: tuple[float, float]
    claim_ms: float
    proposal_ms: float
    tell_ms: float
    rivals_ms: float
    proposals: float
    trials_per_second: float


class _TimedFront(FrontSampler):
    """The sampler `front` that remembers how long its proposals took."""

    seconds, proposals = 0.0, 0

    def propose(self, study: Study) -> Proposal | None:
        self.proposals += 1
        took, found = timed(lambda: super(_TimedFront, self).propose(study))
        self.seconds += took
        return found


class _TimedRandom(Unrepeated):
    """The sampler `random`, with the same memory."""

    seconds, proposals = 0.0, 0

    def propose(self, study: Study) -> Proposal | None:
        self.proposals += 1
        took, found = timed(lambda: super(_TimedRandom, self).propose(study))
        self.seconds += took
        return found


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Seconds that an action took, and what it returned."""
    began = time.perf_counter()
    found = action()
    return time.perf_counter() - began, found


def measure(choice: StorageChoice, folder: Path, *, workers: int, trials: int, sampler: str) -> Overhead:
    """Overhead of a new study in a new `folder`, evaluated by so many processes that begin together.

    The password of a database must be in the environment.
    """
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    run.write_json(STORAGE, asdict(choice))
    connect(choice, run, _quiet)  # makes tables and study, which is no worker's work
    command = [sys.executable, "-m", "benchmarks.worker_overhead", str(folder), sampler, str(trials)]
    outside = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(number)], env=outside, stdout=subprocess.PIPE, encoding="utf-8")
        for number in range(workers)
    ]
    while not all(_ready(folder, number).exists() for number in range(workers)):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a worker of {folder} ended before it began; its words are above")
        time.sleep(_LOOK_EVERY)
    (folder / _GO).touch()
    answers = [json.loads(process.communicate()[0]) for process in processes]
    spent = [Spent(*seconds) for answer in answers for seconds in answer["spent"]]
    if len(spent) != trials:
        raise RuntimeError(f"{folder}: expected {trials} trials told by {workers} workers, found {len(spent)}")
    began, ended = min(answer["began"] for answer in answers), max(answer["ended"] for answer in answers)
    return _summary(spent, ended - began)


def _summary(spent: Sequence[Spent], seconds: float) -> Overhead:
    ms = sorted(1e3 * (one.claim + one.tell) for one in spent)
    quartiles = statistics.quantiles(ms, n=4)

    def median(values: Sequence[float]) -> float:
        return 1e3 * statistics.median(values)

    return Overhead(
        ms=statistics.median(ms),
        mean_ms=statistics.fmean(ms),
        quartiles_ms=(quartiles[0], quartiles[2]),
        claim_ms=median([one.claim for one in spent]),
        proposal_ms=median([one.proposal for one in spent]),
        tell_ms=median([one.tell for one in spent]),
        rivals_ms=median([one.rivals for one in spent]),
        proposals=statistics.fmean(one.proposals for one in spent),
        trials_per_second=len(spent) / seconds,
    )


def work(opened: OpenStudy, owner: Owner, asked: int, sampler: str, number: int) -> list[Spent]:
    """Claim and tell, as `search.run.worker_loop` does, until the study has what is asked."""
    catalogue = catalogue_of(COMPONENTS)
    space = dict(zip(catalogue.names, catalogue.precisions, strict=True))
    timer = opened.study.sampler = _sampler(sampler, space, number)
    spent: list[Spent] = []
    while True:
        timer.seconds, timer.proposals = 0.0, 0
        claiming, claimed = timed(lambda: claim(opened, space, owner, asked, sampler))
        if not isinstance(claimed, Trial):
            if claimed is not Idle.wait:
                return spent
            time.sleep(_LOOK_EVERY)
            continue
        reading, _ = timed(lambda trial=claimed: _rivals(opened, trial))  # type: ignore[misc]
        measured = _made_up(map_of(stored(opened.study, claimed)))
        telling, told = timed(
            lambda trial=claimed, made=measured: tell(opened, trial, made, BUDGET_PERCENT, 0.0)  # type: ignore[misc]
        )
        if not told:
            raise RuntimeError(f"trial {claimed.number} was taken away, though no worker died")
        spent.append(Spent(timer.proposals, timer.seconds, claiming, reading, telling))


def _sampler(name: str, space: Mapping[str, tuple[str, ...]], seed: int) -> _TimedFront | _TimedRandom:
    if name == "front":
        return _TimedFront(before_any_trial(catalogue_of(COMPONENTS), _effects(0.5)), BUDGET_PERCENT, seed)
    distributions = {component: CategoricalDistribution(choices) for component, choices in space.items()}
    return _TimedRandom(RandomSampler(seed=seed), distributions, seed)


def _effects(wrong: float) -> dict[str, dict[str, float]]:
    """Drawn effects of each component and precision; `wrong`: how far off they are, as a spread of their logarithm."""
    catalogue = catalogue_of(COMPONENTS)
    true = np.random.default_rng(0).lognormal(0, 1, (COMPONENTS, 1)) * np.array([0, 0.01, 0.2, 1.0]) * 0.3 / COMPONENTS
    rough = true * np.random.default_rng(1).lognormal(0, wrong, true.shape)
    rows = zip(catalogue.names, catalogue.precisions, rough.tolist(), strict=True)
    return {name: dict(zip(precisions, row, strict=True)) for name, precisions, row in rows}


def _rivals(opened: OpenStudy, trial: Trial) -> None:
    """What a worker reads between claim and evaluation."""
    frozen = stored(opened.study, trial)
    if frozen.user_attrs.get(ORIGIN) in SAMPLERS:
        finished_differences(opened.study)


def _made_up(params: Mapping[str, str]) -> Measured:
    """Figures of a map whose effects add up, with the noise of its windows."""
    catalogue, effects = catalogue_of(COMPONENTS), _effects(0.0)
    rise = sum(effects[name][precision] for name, precision in params.items())
    seed = zlib.crc32(json.dumps(params, sort_keys=True).encode())
    differences = rise + np.random.default_rng(seed).normal(0, 0.01, WINDOWS)
    mean, stderr = float(differences.mean()), float(differences.std() / WINDOWS**0.5)
    size = int(catalogue.bytes(catalogue.encode(params)[None])[0])
    increase = Increase(mean, stderr, WINDOWS)
    return Measured(size, catalogue.fp32_bytes / size, 20 * float(np.exp(mean)), increase, differences, WINDOWS)


def _ready(folder: Path, number: int) -> Path:
    return folder / f"ready-{number}"


def _quiet(line: str) -> None:
    """Nothing is said while being timed."""


def main() -> None:
    """One worker: begins with the others, prints the seconds of its trials."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("sampler", choices=("random", "front"))
    arguments.add_argument("trials", type=int)
    arguments.add_argument("number", type=int)
    asked = arguments.parse_args()
    run = RunDirectory(asked.folder)
    opened = connect(StorageChoice(**run.read_json(STORAGE)), run, _quiet)
    _ready(asked.folder, asked.number).touch()
    while not (asked.folder / _GO).exists():
        time.sleep(_LOOK_EVERY)
    began = time.time()
    spent = work(opened, this_process(), asked.trials, asked.sampler, asked.number)
    rows = [astuple(one) for one in spent]
    print(json.dumps({"began": began, "ended": time.time(), "spent": rows}))


if __name__ == "__main__":
    main()
