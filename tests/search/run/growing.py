"""A study of no model whose space grows, opened as by processes one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.stop import Stop
from search.measure.objective import Measured
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.run.claim import Seed, claim, queue
from search.run.study import begin, open_study
from search.run.widening import check_or_widen
from search.run.worker_loop import Worker
from search.trials.maps import map_key, map_of
from search.trials.owner import LEASES, Owner, lease, this_process
from search.trials.storage import OpenStudy, connect, stored_choice
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Increase
from tests.search.run import claiming

BEFORE = {"a": ["fp16", "int8"], "b": ["fp16", "int8"], "c": ["fp16", "int8"], "pinned": ["fp16"], "d": ["fp16"]}
NOW = {"a": ["fp16", "int8", "nf4"], "b": ["fp16", "int8"], "c": ["fp16", "int8"], "pinned": ["fp16"],
       "d": ["fp16", "nf4"]}  # fmt: skip
KINDS = ["sqlite", "journal"]
GONE = Owner("gone", "elsewhere", "elsewhere", 1)


def quiet(line: str) -> None:
    """Says nothing."""


def free(space: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(choices) for name, choices in space.items() if len(choices) > 1}


def fingerprint(space: Mapping[str, Sequence[str]], **others: str) -> dict[str, Any]:
    return {"checkpoint": "x", **others, "space": dict(space)}


def measured(params: Mapping[str, str]) -> Measured:
    lowered = sum(precision != "fp16" for precision in params.values())
    if params["a"] == "int8" and params["b"] == "int8":
        raise EvaluationError("not finite")
    stopped = "over budget" if lowered == 2 else None
    found = claiming.measured({f"c{i}": "int8" for i in range(lowered)})
    lower = 6.0 if stopped else None
    return replace(found, stopped=stopped, increase=Increase(0.01 * lowered, 1e-3, 50), lower_percent=lower)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Place:
    """A run directory with a study of no model, opened in one space or another as by a process of its own."""

    folder: Path
    kind: str

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / "run")

    def spec(self, trials: int = 7, budget: float = 5.0) -> StudySpec:
        (self.folder / "s.toml").write_text('[checkpoint]\npath = "m.pt"\n')
        values = [f"storage.kind={self.kind}", "search.sampler=random", f"search.trials={trials}"]
        return load_spec(self.folder / "s.toml", [*values, f"search.budget_percent={budget}"])

    def open(self, space: Mapping[str, Sequence[str]], say: Callable[[str], None] = quiet) -> OpenStudy:
        """As `prepare` and then `search` do."""
        self.run.path.mkdir(exist_ok=True)
        check_or_widen(self.spec(), self.run, fingerprint(space), say)
        return open_study(self.spec(), self.run, free(space), fingerprint(space), many=self.kind != "sqlite")

    def connected(self) -> OpenStudy:
        choice = stored_choice(self.run)
        assert choice is not None
        return connect(choice, self.run, quiet)

    def work(self, space: Mapping[str, Sequence[str]], trials: int = 7, seeds: Sequence[Seed] = ()) -> OpenStudy:
        """One worker from its start to its end."""
        opened, owner = self.open(space), this_process()
        with lease(self.run / LEASES, owner):
            asked = begin(opened, seeds, free(space), trials, 5.0)
            Worker(
                opened=opened, run=self.run, space=free(space), owner=owner, asked=asked, budget_percent=5.0,
                sampler="random", evaluate=lambda task: measured(task.params), after=lambda finished: None, say=quiet,
                stop=Stop(),
            ).work()  # fmt: skip
        return opened

    def searched(self) -> OpenStudy:
        """With finished, stopped, failed, interrupted and queued trials, not all there are."""
        first = ["int8 int8 fp16", "int8 fp16 int8", "int8 fp16 fp16", "fp16 int8 fp16", "fp16 fp16 fp16"]
        self.work(BEFORE, 4, [Seed(dict(zip("abc", one.split(), strict=True)), one) for one in first])
        opened = self.open(BEFORE)
        left = [
            params for params in every(BEFORE) if map_key(params) not in {map_key(map_of(t)) for t in trials(opened)}
        ]
        for params in left[:2]:
            queue(opened.study, Seed(params, "queued"), free(BEFORE))
        claim(opened, free(BEFORE), GONE, 99, "random")  # and its worker is gone
        assert {trial.state for trial in trials(opened)} == {*TrialState}
        return opened


def every(space: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = [{}]
    for name, choices in free(space).items():
        found = [{**one, name: choice} for one in found for choice in choices]
    return found


def trials(opened: OpenStudy | Study) -> list[FrozenTrial]:
    study = opened if isinstance(opened, Study) else opened.study
    return study.get_trials(deepcopy=True)
