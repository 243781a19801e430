"""Several trials at once: what each measures, and that claims, signals and deaths cost nothing."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.base.errors import StudyError
from search.base.stop import Stop, WorkInterruptedError
from search.measure.objective import Measured, Objective, measure_baseline
from search.measure.stacking import StackedObjective, trials_at_once
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.run.worker_loop import Ending, Task, Together
from search.trials.maps import map_key
from search.trials.read_back import counts
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError, InfeasibleError
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.precision_map import PrecisionMap
from tests.cluster import studying
from tests.cluster.studying import SEEDS_ONLY, STUDY, front_of, measurements, require_exact, ssm_mp
from tests.search.run import claiming
from tests.search.run.claiming import SPACE, Bench, measured, seeds
from tests.tiny import write_study

TABLES = """
[precision]
choices = ["fp16", "int8", "int3"]
activations = "none"
[search]
budget_percent = 0.02
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("study")
    return open_workspace(load_spec(write_study(folder, windows=(4, 64, 16), extra=TABLES)))


@pytest.fixture(scope="module")
def objectives(workspace: Workspace) -> tuple[Objective, StackedObjective]:
    baseline = measure_baseline(workspace)
    return Objective(workspace, baseline), StackedObjective(workspace, baseline)


def some_maps(workspace: Workspace, count: int, seed: int = 0) -> list[PrecisionMap]:
    rng = random.Random(seed)
    space = workspace.space
    return [space.map({c.name: rng.choice(space.choices[c.name]) for c in space.free}) for _ in range(count)]


def require_same(found: Sequence[Any], expected: Sequence[Measured]) -> None:
    assert len(found) == len(expected)
    for ours, truth in zip(found, expected, strict=True):
        assert isinstance(ours, Measured)
        assert (ours.bytes, ours.of_windows, ours.stopped) == (truth.bytes, truth.of_windows, truth.stopped)
        assert ours.increase.windows == truth.increase.windows
        np.testing.assert_allclose(ours.differences, truth.differences, atol=1e-6)
        assert (ours.lower_percent is None) == (truth.lower_percent is None)
        assert ours.lower_percent == pytest.approx(truth.lower_percent, abs=1e-3)
        assert ours.perplexity == pytest.approx(truth.perplexity, rel=1e-6)


def test_maps_at_once_measure_what_each_measures_alone(
    workspace: Workspace, objectives: tuple[Objective, StackedObjective]
) -> None:
    alone, together = objectives
    maps = some_maps(workspace, 6)
    require_same(together.all_windows(maps), [alone(one) for one in maps])


def test_maps_that_race_at_once_end_as_each_does_alone(
    workspace: Workspace, objectives: tuple[Objective, StackedObjective]
) -> None:
    alone, together = objectives
    maps = some_maps(workspace, 10)
    rival = alone(workspace.space.widest())
    strong = [(1, rival.differences - 0.02)]  # smaller than any map, and better than the widest
    entries = [(one, [] if m % 2 else strong) for m, one in enumerate(maps)]
    expected = [alone.race(*entry, 0.4) for entry in entries]
    assert {one.stopped for one in expected} == {None, "over budget", "dominated"}
    assert len({one.increase.windows for one in expected}) > 1
    require_same(together.race_many(entries, 0.4), expected)


def test_a_stopped_map_leaves_the_stack(
    workspace: Workspace, objectives: tuple[Objective, StackedObjective], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = objectives[1]
    maps = some_maps(workspace, 10)
    seen: list[tuple[int, int]] = []

    def counted(converter: Any, stacked: Sequence[PrecisionMap], windows: Windows, *rest: Any, **more: Any) -> Any:
        seen.append((len(stacked), len(windows)))
        return evaluate_stacked(converter, stacked, windows, *rest, **more)

    monkeypatch.setattr("search.problem.judge.evaluate_stacked", counted)
    found = together.race_many([(one, []) for one in maps], 0.4)
    spent = sum(one.increase.windows for one in found if isinstance(one, Measured))
    assert sum(count * windows for count, windows in seen) == spent
    assert spent < 64 * len(maps)


def test_what_is_wrong_with_one_map_stands_in_its_place(
    workspace: Workspace, objectives: tuple[Objective, StackedObjective], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = objectives
    maps = some_maps(workspace, 4)
    faults = {maps[1]: InfeasibleError("too large"), maps[2]: EvaluationError("not finite")}

    def with_faults(converter: Any, stacked: Sequence[PrecisionMap], *rest: Any, **more: Any) -> Any:
        found = evaluate_stacked(converter, stacked, *rest, **more)
        return [faults.get(one, outcome) for one, outcome in zip(stacked, found, strict=True)]

    monkeypatch.setattr("search.problem.judge.evaluate_stacked", with_faults)
    for found in (together.all_windows(maps), together.race_many([(one, []) for one in maps], 1e-9)):
        assert found[1:3] == list(faults.values())
        require_same([found[0], found[3]], [alone(maps[0]), alone(maps[3])])


def test_a_signal_ends_a_stack(workspace: Workspace) -> None:
    stop = Stop()
    stop.signal = signal.SIGTERM
    objective = StackedObjective(workspace, measure_baseline(workspace), stop.check)
    with pytest.raises(WorkInterruptedError):
        objective.race_many([(one, []) for one in some_maps(workspace, 2)], 0.01)


def _on(workspace: Workspace, **search: Any) -> Workspace:
    """The same workspace under another `[search]`."""
    spec = workspace.spec
    return replace(workspace, spec=spec.model_copy(update={"search": spec.search.model_copy(update=search)}))


def test_how_many_trials_are_taken_at_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.measure.stacking.at_once", lambda model, length: 100)
    assert trials_at_once(_on(workspace, device="cpu")) == 1
    assert trials_at_once(_on(workspace, device="cpu", stacked=5)) == 5
    assert trials_at_once(_on(workspace, device="cuda", trials=64)) == 8  # proposals are to see results
    assert trials_at_once(_on(workspace, device="cuda", trials=6400)) == 100  # as many as memory allows
    assert trials_at_once(_on(workspace, device="cuda", trials=3)) == 1
    assert trials_at_once(_on(workspace, device="cuda", stacked=200)) == 200


@pytest.mark.parametrize("value", ["0", "-1", "4097", '"many"', "true", "1.5"])
def test_a_wrong_number_of_stacked_trials_is_refused(tmp_path: Path, value: str) -> None:
    study = write_study(tmp_path, extra=f"[search]\nstacked = {value}\n")
    with pytest.raises(StudyError, match=r"\[search\] stacked"):
        load_spec(study)


Together_ = Callable[[Sequence[Task]], Sequence[Any]]


def evaluated_together(tasks: Sequence[Task]) -> list[Measured]:
    return [measured(task.params) for task in tasks]


@dataclass(frozen=True)
class StackedBench(Bench):
    """A bench whose workers take three trials at once."""

    def work(self, asked: int, queued: Iterable[Any] = (), **options: Any) -> Ending:
        return self.work_stacked(asked, queued, **options)

    def work_stacked(
        self,
        asked: int,
        queued: Iterable[Any] = (),
        *,
        together: Together_ = evaluated_together,
        most: int = 3,
        **options: Any,
    ) -> Ending:
        """As `work`, with another way to evaluate several trials."""
        return super().work(asked, list(queued), together=Together(most, together), **options)


def stacked_bench(folder: Path, sampler: str = "random") -> StackedBench:
    bench = StackedBench.at(folder, "journal", sampler=sampler)
    assert isinstance(bench, StackedBench)
    return bench


@pytest.mark.parametrize("sampler", ["front", "random"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_that_take_several_trials_at_once_finish_exactly_n_different_maps(
    tmp_path: Path, workers: int, sampler: str
) -> None:
    bench = stacked_bench(tmp_path, sampler)
    bench.work_together(workers, 29, seeds(5))
    maps = bench.require_whole(29)
    assert {map_key(seed.params) for seed in seeds(5)} <= {map_key(one) for one in maps}


def test_a_worker_takes_no_more_trials_at_once_than_it_may_or_than_are_asked_for(tmp_path: Path) -> None:
    taken: list[int] = []

    def counted(tasks: Sequence[Task]) -> list[Measured]:
        taken.append(len(tasks))
        return evaluated_together(tasks)

    def single(task: Task) -> Measured:
        taken.append(1)
        return measured(task.params)

    bench = stacked_bench(tmp_path)
    assert bench.work_stacked(13, seeds(5), together=counted, evaluate=single, most=4) == "finished"
    assert taken == [4, 4, 4, 1]
    bench.require_whole(13)


def test_a_worker_that_has_tried_every_map_is_done(tmp_path: Path) -> None:
    bench = stacked_bench(tmp_path)
    assert bench.work_stacked(1000, most=50) == "exhausted"
    bench.require_whole(2 ** len(SPACE))


def test_seeds_in_a_stack_race_against_nobody(tmp_path: Path) -> None:
    rivals: list[int] = []

    def counted(tasks: Sequence[Task]) -> list[Measured]:
        rivals.extend(len(task.rivals) for task in tasks)
        return evaluated_together(tasks)

    stacked_bench(tmp_path, "front").work_stacked(9, seeds(4), together=counted)
    assert rivals == [0, 0, 0, 0, 3, 3, 6, 6, 6]


def test_a_signal_in_the_middle_of_a_stack_gives_all_of_it_back(tmp_path: Path) -> None:
    bench, stop = stacked_bench(tmp_path), Stop()

    def signalled(tasks: Sequence[Task]) -> list[Measured]:
        stop.signal = signal.SIGUSR1
        stop.check()
        return evaluated_together(tasks)

    assert bench.work_stacked(5, seeds(5), together=signalled, stop=stop) == "stopped"
    found = counts(bench.opened().study)
    assert (found.running, found.waiting, found.finished) == (0, 5, 0)
    assert found.reasons == {"given back on SIGUSR1, and tried again": 3}
    bench.work(5)
    assert {map_key(one) for one in bench.require_whole(5)} == {map_key(seed.params) for seed in seeds(5)}


def test_a_failed_trial_of_a_stack_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    bench = stacked_bench(tmp_path)
    broken = map_key(seeds(5)[1].params)

    def failing(tasks: Sequence[Task]) -> list[Measured | EvaluationError]:
        return [
            EvaluationError("not finite") if map_key(task.params) == broken else measured(task.params) for task in tasks
        ]

    bench.work_stacked(6, seeds(5), together=failing)
    maps = bench.require_whole(6)
    assert broken not in {map_key(one) for one in maps}
    assert counts(bench.opened().study).reasons == {"not finite": 1}


def test_a_study_in_which_everything_fails_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="the last 20 trials all failed: broken"):
        stacked_bench(tmp_path).work_stacked(
            60, together=lambda tasks: [EvaluationError("broken") for _ in tasks], most=7
        )


def test_a_worker_with_a_stack_killed_before_any_of_its_writes_costs_nothing(tmp_path: Path) -> None:
    claiming.every_death(stacked_bench, tmp_path, asked=4, queued=seeds(3))


def test_a_lost_answer_of_the_database_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.trials.storage.time", claiming.IMPATIENT)
    claiming.every_lost_answer(stacked_bench, tmp_path, asked=4, queued=seeds(3))


@pytest.mark.slow
def test_a_search_that_stacks_its_trials_finds_what_one_without_finds(tmp_path: Path) -> None:
    for stacked in (1, 6):
        folder = tmp_path / str(stacked)
        studying.write_seeded_study(folder, windows=64)
        done = ssm_mp("search", STUDY, "--set", f"search.stacked={stacked}", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert not require_exact(folder, SEEDS_ONLY).reasons
    expected, found = measurements(tmp_path / "1"), measurements(tmp_path / "6")
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-4)
    assert front_of(tmp_path / "6").keys() == front_of(tmp_path / "1").keys()
