"""A study with a made-up objective on any storage, workers for it, and storages that fail or kill on purpose."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from search.base.stop import Stop
from search.measure.objective import Measured
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.run.claim import Seed
from search.run.study import begin, open_study
from search.run.worker_loop import Ending, Evaluate, Task, Together, Worker
from search.sampling.catalogue import Catalogue
from search.sampling.knowledge import before_any_trial
from search.trials.attributes import FINISHED, REASON
from search.trials.maps import map_key, map_of
from search.trials.owner import LEASES, Owner, lease, this_process
from search.trials.storage import OpenStudy
from ssm_mp.evaluation.evaluate import Increase

SPACE = {f"c{i}": ("fp16", "int8") for i in range(7)}
COST = {f"c{i}": 0.003 * (i + 1) for i in range(7)}
BUDGET = 5.0
_CATALOGUE = Catalogue(tuple(SPACE), tuple(SPACE.values()), ((200, 100),) * 7, 0, 2000)
_KNOWLEDGE = before_any_trial(_CATALOGUE, {name: {"fp16": 0.0, "int8": 2 * cost} for name, cost in COST.items()})

WRITES = frozenset(
    {
        *("create_new_trial", "set_trial_param", "set_trial_state_values", "set_trial_user_attr"),
        *("set_trial_system_attr", "set_study_user_attr", "set_study_system_attr"),
    }
)
READS = frozenset({"get_all_trials", "get_trial", "get_study_user_attrs", "get_study_system_attrs"})

IMPATIENT = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
"""In place of the module `time`: a database that is away only for a moment is asked again at once."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the dead worker would have done afterwards happens."""


def seeds(number: int) -> list[Seed]:
    """Different maps: component i lowered in map i, two of them in map 7 + i."""
    lowered = [{i % 7, (i + 1 + i // 7) % 7} if i >= 7 else {i} for i in range(number)]
    return [
        Seed({name: "int8" if j in held else "fp16" for j, name in enumerate(SPACE)}, f"seed {i}")
        for i, held in enumerate(lowered)
    ]


def measured(params: Mapping[str, str]) -> Measured:
    """What a map measures: it depends on the map only."""
    size = 1000 - 100 * sum(precision == "int8" for precision in params.values())
    cost = sum(COST[name] for name, precision in params.items() if precision == "int8")
    return Measured(size, 2000 / size, 10 * (1 + cost), Increase(cost, 1e-4, 50), np.full(50, cost), 50)


def evaluated(task: Task) -> Measured:
    """The objective of a worker."""
    return measured(task.params)


@dataclass(frozen=True)
class Bench:
    """One run directory and its storage, which any number of workers open as if each were a process of its own."""

    run: RunDirectory
    overrides: tuple[str, ...]
    many: bool
    connections: list[OpenStudy] = field(default_factory=list)

    @classmethod
    def at(cls, folder: Path, kind: str, url: str = "", sampler: str = "random") -> Bench:
        (folder / "s.toml").write_text('[checkpoint]\npath = "m.pt"\n')
        place = [f"storage.kind={kind}", *([f"storage.url={url}"] if url else [])]
        run = RunDirectory(folder / "run")
        run.path.mkdir()
        return cls(run, (*place, f"search.sampler={sampler}"), kind != "sqlite")

    def opened(self, worker: str = "") -> OpenStudy:
        """The study, by a new connection."""
        spec = load_spec(self.run.path.parent / "s.toml", self.overrides)
        found = open_study(spec, self.run, SPACE, {"checkpoint": "a"}, _KNOWLEDGE, worker=worker, many=self.many)
        self.connections.append(found)
        return found

    def close(self) -> None:
        """Let go of a server's connections, of which it has few."""
        for opened in self.connections:
            if isinstance(opened._lock, Engine):
                opened._lock.dispose()

    def work(
        self,
        asked: int,
        queued: Sequence[Seed] = (),
        *,
        opened: OpenStudy | None = None,
        evaluate: Evaluate = evaluated,
        owner: Owner | None = None,
        said: Callable[[str], None] = lambda line: None,
        stop: Stop | None = None,
        together: Together | None = None,
    ) -> Ending:
        """What one worker process does, from its start to its end."""
        owner = owner or this_process()
        opened = opened or self.opened(owner.lease)
        with lease(self.run / LEASES, owner):
            opened.patiently(lambda: begin(opened, queued, SPACE, asked, BUDGET))
            return Worker(
                opened=opened, run=self.run, space=SPACE, owner=owner, asked=asked, budget_percent=BUDGET,
                sampler=self.overrides[-1].partition("=")[2], evaluate=evaluate, after=lambda finished: None,
                say=said, stop=Stop() if stop is None else stop, together=together,
            ).work()  # fmt: skip

    def work_together(self, workers: int, asked: int, queued: Sequence[Seed] = ()) -> None:
        """Several workers at once, a thread each with a connection of its own."""
        failures: list[BaseException] = []

        def one() -> None:
            try:
                self.work(asked, queued)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def require_whole(self, finished: int) -> list[dict[str, Any]]:
        """Exactly so many trials are finished, none is under way, no map is finished twice, every failure says why.

        Returns the finished maps.
        """
        trials = self.opened().study.get_trials(deepcopy=False)
        maps = [map_of(trial) for trial in trials if trial.state in FINISHED]
        assert len(maps) == finished
        assert [key for key, count in Counter(map_key(one) for one in maps).items() if count > 1] == []
        assert all(set(one) == set(SPACE) for one in maps)
        assert [trial.number for trial in trials if trial.state == TrialState.RUNNING] == []
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        assert [trial.number for trial in failed if not trial.user_attrs.get(REASON)] == []
        return maps


@dataclass
class Deadly:
    """A storage whose worker is killed just before its `fatal`-th write; counts writes."""

    inner: Any
    fatal: int = 0
    writes: int = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.inner, name)
        if name not in WRITES:
            return real

        def write(*args: Any, **kwargs: Any) -> Any:
            self.writes += 1
            if self.fatal and self.writes >= self.fatal:  # once dead it writes no more
                raise Killed
            return real(*args, **kwargs)

        return write


@dataclass
class Deaf:
    """A storage of which the answer of the `lost`-th operation is lost after it was done; counts operations."""

    inner: Any
    lost: int = 0
    operations: int = 0
    names: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.inner, name)
        if name not in WRITES | READS:
            return real

        def operate(*args: Any, **kwargs: Any) -> Any:
            self.operations += 1
            self.names.append(name)
            done = real(*args, **kwargs)
            if self.operations == self.lost:
                raise StorageInternalError("lost") from OperationalError(name, {}, Exception("connection closed"))
            return done

        return operate


def through(opened: OpenStudy, storage: Any) -> OpenStudy:
    """The same study by another storage object."""
    opened.study._storage = storage
    return opened


def as_on_a_server(opened: OpenStudy) -> OpenStudy:
    """The same study, whose worker waits for its database as it does for PostgreSQL."""
    return replace(opened, choice=replace(opened.choice, kind="postgresql"))


def every_death(
    bench_at: Callable[[Path], Bench],
    folder: Path,
    asked: int,
    queued: Sequence[Seed],
    evaluate: Evaluate = evaluated,
) -> set[frozenset[str]]:
    """Kill a worker before each of its writes in turn, and let another finish; the sets of finished maps."""
    found = set()
    for fatal in range(1, 1000):
        (folder / str(fatal)).mkdir(parents=True)
        bench = bench_at(folder / str(fatal))
        opened = bench.opened()
        storage = Deadly(opened.study._storage, fatal)
        survived = True
        try:
            bench.work(asked, queued, opened=through(opened, storage), evaluate=evaluate)
        except Killed:
            survived = False
        bench.work(asked, queued, evaluate=evaluate)
        found.add(frozenset(map_key(one) for one in bench.require_whole(asked)))
        bench.close()
        if survived:
            assert fatal > asked * 4  # each trial is at least claimed, measured, held to the budget and told
            return found
    raise AssertionError("the worker never lived to the end")


def every_lost_answer(bench_at: Callable[[Path], Bench], folder: Path, asked: int, queued: Sequence[Seed]) -> None:
    """Lose the answer of each operation of a worker in turn; the worker itself must get to the end."""
    for lost in range(1, 1000):
        (folder / str(lost)).mkdir(parents=True)
        bench = bench_at(folder / str(lost))
        opened = bench.opened()
        storage = Deaf(opened.study._storage, lost)
        bench.work(asked, queued, opened=as_on_a_server(through(opened, storage)))
        maps = bench.require_whole(asked)
        bench.close()
        assert {map_key(seed.params) for seed in queued} <= {map_key(one) for one in maps}
        if storage.operations < lost:
            assert {"create_new_trial", "set_trial_state_values", "get_all_trials", "get_trial"} <= set(storage.names)
            return
    raise AssertionError("the worker never got to the end")
