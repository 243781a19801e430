"""Faults done to the workers of many short studies, one after another, and what became of the trials.

    python -m benchmarks.workers --only faults --faults 500

The studies are of the tests' tiny model: on a private Slurm with a journal, and on this machine with a private
PostgreSQL. A fault counts only where it hit a worker with a trial in hand. `kills`: SIGKILL to a worker that the
storage names as owner of a running trial at that moment, or that holds the study's lock, so is within claim or tell.
`requeues` (`scontrol requeue`), `preemptions` (an urgent job takes the node) and `nodes_down` (the node dies with all
on it): each worker that was hit so, and whose trial therefore failed and was tried again. `restarts`: PostgreSQL
crashes (an immediate stop) and starts again under workers that have trials in hand, one each time. `timeouts`: the
warning before its time limit made a worker give its trial back.

After each study all trials asked for must be finished, no map twice, and none may be running; where all are seeds,
each map must have exactly the values that one undisturbed worker measured, and the front must be the same.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from benchmarks.worker_sites import Fault, LocalSite, Site, SlurmSite
from search.trials.attributes import OWNER
from search.trials.owner import Owner, owner_from_json
from search.trials.read_back import ASKED
from tests.cluster.private_postgres import PrivatePostgres
from tests.cluster.private_slurm import private_slurm
from tests.cluster.processes import private_directory
from tests.cluster.studying import (
    STUDY,
    Values,
    front_of,
    ledger,
    measurements,
    ssm_mp,
    study_of,
    write_seeded_study,
)
from tests.tiny import MAMBA, write_checkpoint

FAULTS: tuple[Fault, ...] = get_args(Fault)
SHARES: Mapping[Fault, float] = {
    "kills": 0.56, "requeues": 0.12, "preemptions": 0.10, "nodes_down": 0.04, "restarts": 0.14, "timeouts": 0.04,
}  # fmt: skip
"""Of a hundred faults so many are of each kind."""
WORKERS = 6
SEEDS, PROPOSALS, SLOW = 60, 240, 30
"""Trials of a study whose maps are all seeds, of 0.2 s each; of one with proposals, of a few milliseconds; of a slow
one, each of some seconds."""
SLOWER = replace(MAMBA, d_model=64, d_inner=128, n_layers=4)
"""Trials of some seconds, for workers that shall reach their time limit."""

_SLURM = '[slurm]\ncpus_per_task = 1\nmem = "1900M"\ngres = ""\ntime = "{time}"\nwarning_seconds = {warning}\n'
_PAUSES = (0.1, 1.5)
_DEADLINE_SECONDS = 600.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A study to be disturbed: a folder with its file and baseline.

    undisturbed: values and front of a run without faults; None where maps depend on who proposes when.
    """

    folder: Path
    undisturbed: tuple[dict[str, Values], dict[str, Values]] | None


@dataclass(frozen=True)
class Survived:
    """All studies together. faults: how many of each kind hit a worker with a trial in hand."""

    faults: Mapping[str, int]
    studies: int
    asked: int
    finished: int
    lost: int
    doubled: int
    running: int
    fronts_compared: int
    fronts_changed: int
    seconds: float


class Tally:
    """Counts over studies, the chance that chooses faults, and who is told how it goes."""

    def __init__(self, rng: random.Random, say: Say) -> None:
        self.rng, self.say = rng, say
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()

    def survived(self) -> Survived:
        """The figures so far."""
        names = ("studies", "asked", "finished", "lost", "doubled", "running", "fronts_compared", "fronts_changed")
        faults: dict[str, int] = {name: self.counts[name] for name in FAULTS}
        seconds = round(time.monotonic() - self.began, 1)
        return Survived(faults=faults, seconds=seconds, **{name: self.counts[name] for name in names})


def survive(faults: int, server: PrivatePostgres, seed: int, say: Say) -> Survived:
    """Do so many faults, of all kinds, and count. The server's password must be in the environment."""
    wanted: dict[Fault, int] = {kind: round(share * faults) for kind, share in SHARES.items()}
    tally = Tally(random.Random(seed), say)
    with private_directory("ssm-faults") as top:
        cases = [_seeds_case(top / "seeds"), _proposals_case(top / "proposals")]
        say(f"undisturbed runs took {time.monotonic() - tally.began:.0f} s")
        postgres = ("--set", "storage.kind=postgresql", "--set", f"storage.url={server.url}")
        local: dict[Fault, int] = {"kills": wanted["kills"] // 2, "restarts": wanted["restarts"]}
        _stage(top / "local", cases, local, lambda folder: LocalSite(folder, WORKERS, postgres, server), tally)
        with private_directory("ssm-slurm") as directory, private_slurm(directory) as slurm:

            def on_slurm(folder: Path) -> Site:
                return SlurmSite(folder, WORKERS, slurm)

            kinds: tuple[Fault, ...] = ("kills", "requeues", "preemptions", "nodes_down")
            _stage(top / "slurm", cases, {kind: wanted[kind] for kind in kinds}, on_slurm, tally)
            if wanted["timeouts"]:
                slow = [_slow_case(top / "slower")]
                _stage(top / "slow", slow, {"timeouts": wanted["timeouts"]}, on_slurm, tally)
    return tally.survived()


def _stage(
    top: Path, cases: Sequence[Case], wanted: Mapping[Fault, int], site: Callable[[Path], Site], tally: Tally
) -> None:
    """Disturb the cases in turn until as many faults as wanted, of all stages so far, have hit."""
    number = 0
    while left := {kind: count - tally.counts[kind] for kind, count in wanted.items() if tally.counts[kind] < count}:
        case, folder = cases[number % len(cases)], top / str(number)
        shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("study.journal", "storage.json", "workers"))
        began = time.monotonic()
        _disturbed(site(folder), folder, left, tally)
        _compare(case, folder, tally)
        shutil.rmtree(folder)
        tally.say(f"{top.name} {number}: {time.monotonic() - began:.0f} s; so far {dict(tally.counts)}")
        number += 1


def _disturbed(site: Site, folder: Path, left: Mapping[Fault, int], tally: Tally) -> None:
    """One study from its first worker to its last trial, with faults as often as they hit."""
    meant: dict[Owner, Fault] = {}
    restarts = 0
    end = time.monotonic() + _DEADLINE_SECONDS
    while (study := study_of(folder)) is None or not study.user_attrs.get(ASKED):
        site.fill()
        time.sleep(0.5)
    while (standing := ledger(study)).finished < standing.asked:
        if time.monotonic() > end:
            raise TimeoutError(f"expected a finished study after {_DEADLINE_SECONDS:.0f} s, found {standing}")
        site.fill()
        time.sleep(tally.rng.uniform(*_PAUSES))
        done = Counter(meant.values()) + Counter(restarts=restarts)
        weights = {kind: max(0, count - done[kind]) for kind, count in left.items() if kind != "timeouts"}
        if not any(weights.values()):
            continue
        kind = tally.rng.choices(list(weights), list(weights.values()))[0]
        hit = site.inflict(kind, lambda: _owners(study), tally.rng)
        if kind == "restarts":
            restarts += bool(hit)
        else:
            meant.update({owner: kind for owner in hit if owner not in meant})
    site.leave()
    tried_again = {_owner(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))}
    tally.counts.update(kind for owner, kind in meant.items() if kind == "kills" or owner in tried_again)
    tally.counts["restarts"] += restarts
    if "timeouts" in left:
        tally.counts["timeouts"] += sum(count for why, count in ledger(study).reasons.items() if "on SIGUSR1" in why)


def _compare(case: Case, folder: Path, tally: Tally) -> None:
    """What became of a study's trials, and whether its values are those of the undisturbed run."""
    found = ledger(study_of(folder))
    for name in ("asked", "finished", "lost", "doubled", "running"):
        tally.counts[name] += getattr(found, name)
    tally.counts["studies"] += 1
    if case.undisturbed:
        tally.counts["fronts_compared"] += 1
        tally.counts["fronts_changed"] += (measurements(folder), front_of(folder)) != case.undisturbed


def _owners(study: Study) -> list[Owner]:
    """Who has a trial in hand at this moment."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [owner for owner in map(_owner, running) if owner is not None]


def _owner(trial: FrozenTrial) -> Owner | None:
    held = trial.user_attrs.get(OWNER)
    return None if held is None else owner_from_json(held)


def _seeds_case(folder: Path) -> Case:
    """All trials are seeds, so every order of them gives the same maps and values."""
    write_seeded_study(folder, windows=12288, trials=SEEDS, extra=_SLURM.format(time="00:20:00", warning=60))
    _run("worker", folder)
    return Case(folder, (measurements(folder), front_of(folder)))


def _proposals_case(folder: Path) -> Case:
    """Short trials, most of them proposed: a fault mostly hits claim or tell."""
    slurm = _SLURM.format(time="00:20:00", warning=60)
    write_seeded_study(folder, windows=32, trials=PROPOSALS, search='sampler = "random"', extra=slurm)
    _run("prepare", folder)
    return Case(folder, None)


def _slow_case(folder: Path) -> Case:
    """A time limit of a minute, the least that Slurm has, and trials of seconds."""
    write_seeded_study(folder, windows=8192, trials=SLOW, extra=_SLURM.format(time="00:01:00", warning=30))
    write_checkpoint(folder / "model.safetensors", SLOWER)
    _run("prepare", folder)
    return Case(folder, None)


def _run(command: str, folder: Path) -> None:
    done = ssm_mp(command, STUDY, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"`ssm-mp {command}` in {folder} ended with {done.returncode}:\n{done.stderr}")
