"""A study with latency as its third objective: its table, its trials, and what has none of it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import Trial

import search.measure.latency
from search.base.errors import StudyError
from search.base.front import Point, front_by_size, pareto_front
from search.base.stop import Stop
from search.measure.latency import prompts, stored_latency, summary
from search.measure.objective import Measured
from search.measure.racing import best_rival
from search.problem.run_directory import FINGERPRINT, LATENCY, RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.run.claim import Seed, claim, enqueue, tell
from search.run.prepare import prepare, seeds
from search.run.study import open_study
from search.run.worker_loop import Task, Worker
from search.sampling.catalogue import Catalogue
from search.sampling.knowledge import before_any_trial
from search.trials.owner import LEASES, Owner, lease, this_process
from search.trials.read_back import points, rivals_of
from search.trials.storage import STORAGE, OpenStudy, read_study
from ssm_mp.evaluation.evaluate import Increase
from ssm_mp.evaluation.latency import Check, LatencyTable, measure_latency
from tests.tiny import HUGGING_FACE, MAMBA, some_windows, write_study

ASKED = 'objectives = ["compression", "perplexity", "latency"]\n'
CHOICES = '[precision]\nchoices = ["fp16", "int8", "nf4"]\n[search]\n'


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.measure.latency, "measure_latency", partial(measure_latency, rounds=3))


def quiet(line: str) -> None:
    """Says nothing."""


# --- the table of a study --------------------------------------------------------------------------------------------


def test_a_table_is_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    spec = load_spec(write_study(tmp_path, extra=CHOICES + ASKED + "latency_batch = 2\nlatency_length = 5\n"))
    first = prepare(spec, run, said.append)
    assert first.latency is not None
    assert (first.latency.batch, first.latency.length) == (2, 5)
    assert sum("measuring latencies" in line for line in said) == 1
    assert any("predictions are off by" in line for line in said)
    assert first.latency.seconds.keys() == first.workspace.space.choices.keys()
    before = (run / LATENCY).read_bytes()

    def never(*args: object, **kwargs: object) -> LatencyTable:
        raise AssertionError("measured anew")

    monkeypatch.setattr(search.measure.latency, "measure_latency", never)
    again = prepare(spec, run, quiet)
    assert again.latency is not None
    assert again.latency.digest == first.latency.digest
    assert (run / LATENCY).read_bytes() == before
    assert seeds(again) == seeds(first)
    found = stored_latency(run)
    assert found is not None
    assert summary(found)["prediction_error"]["maps"] == len(found.checks)


@pytest.mark.parametrize(("predicted", "poor"), [(1.3e-2, True), (1.05e-2, False)])
def test_a_poor_table_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predicted: float, poor: bool
) -> None:
    def measure(*args: object, **kwargs: object) -> LatencyTable:
        found = measure_latency(*args, rounds=1)  # type: ignore[arg-type]
        return replace(found, checks=(Check(1e-2, predicted), Check(2e-2, 2e-2)))

    monkeypatch.setattr(search.measure.latency, "measure_latency", measure)
    said: list[str] = []
    spec = load_spec(write_study(tmp_path, extra="[search]\n" + ASKED))
    prepare(spec, RunDirectory(tmp_path / "run"), said.append)
    assert any("the machine was busy" in line for line in said) is poor


def test_processes_that_prepare_together_have_one_table(tmp_path: Path) -> None:
    spec, run = load_spec(write_study(tmp_path, extra="[search]\n" + ASKED)), RunDirectory(tmp_path / "run")
    digests: list[str] = []

    def one() -> None:
        table = prepare(spec, run, quiet).latency
        assert table is not None
        digests.append(table.digest)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 3
    assert len(set(digests)) == 1


def test_a_study_without_latency_is_written_as_before(tmp_path: Path) -> None:
    spec, run = load_spec(write_study(tmp_path)), RunDirectory(tmp_path / "run")
    prepared = prepare(spec, run, quiet)
    assert prepared.latency is None
    assert not (run / LATENCY).exists()
    assert json.loads((run / FINGERPRINT).read_text()).keys() == {
        *("checkpoint", "search windows", "calibration windows", "scheme", "space", "compute")
    }
    assert prepared.knowledge.catalogue.latencies is None
    point = Point(0, 2.0, 100, 1.0, 0.0, 0.0, {}, "")
    assert "latency_seconds" not in point.to_json()


@pytest.mark.parametrize("began_with", [False, True])
def test_objectives_cannot_change_half_way(tmp_path: Path, began_with: bool) -> None:
    study, run = write_study(tmp_path, extra="[search]\n" + ASKED), RunDirectory(tmp_path / "run")
    asks, asks_not = load_spec(study), load_spec(study, ['search.objectives=["compression", "perplexity"]'])
    first, then = (asks, asks_not) if began_with else (asks_not, asks)
    prepare(first, run, quiet)
    with pytest.raises(StudyError, match="another latency"):
        prepare(then, run, quiet)


def test_another_shape_is_another_study(tmp_path: Path) -> None:
    study, run = write_study(tmp_path, extra="[search]\n" + ASKED), RunDirectory(tmp_path / "run")
    prepare(load_spec(study), run, quiet)
    with pytest.raises(StudyError, match="another latency"):
        prepare(load_spec(study, ["search.latency_batch=2"]), run, quiet)


def test_a_damaged_table_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / LATENCY).write_text('{"colour": "red"}')
    with pytest.raises(StudyError, match=r"latency.json: damaged.*restore it"):
        stored_latency(run)


def test_prompts_have_the_shape_asked_for_and_begin_again_where_the_text_ends() -> None:
    windows = some_windows(3)
    text = windows.ids.flatten()
    found = prompts(windows, 5, 13, HUGGING_FACE)
    assert found.shape == (5, 13)
    assert found.flatten()[:48].tolist() == text.tolist()
    assert found.flatten()[48:].tolist() == text[:17].tolist()
    with pytest.raises(StudyError, match=r"latency_length = 17, but the model has positions for 16"):
        prompts(windows, 1, 17, MAMBA)


# --- trials, without a model -----------------------------------------------------------------------------------------

SPACE = {f"c{i}": ("fp16", "int8") for i in range(5)}
COST = {f"c{i}": 0.004 * (i + 1) for i in range(5)}
# the smaller the slower, but for two components
TABLE = LatencyTable(
    1, 128, "cpu", 1, 31, 9e-3, 5e-3,
    {**{f"c{i}": {"fp16": 1e-3, "int8": (2e-3 if i % 2 else 7e-4) + i * 1e-5} for i in range(5)}, "d": {"fp16": 1e-3}},
    (Check(1e-2, 1e-2), Check(2e-2, 2e-2)),
)  # fmt: skip
CATALOGUE = Catalogue(
    tuple(SPACE), tuple(SPACE.values()), ((200, 100),) * 5, 0, 2000,
    tuple(tuple(round(1e9 * t) for t in TABLE.seconds[name].values()) for name in SPACE), 6_000_000,
)  # fmt: skip
KNOWLEDGE = before_any_trial(CATALOGUE, {name: {"fp16": 0.0, "int8": 2 * cost} for name, cost in COST.items()})


def measured(params: Mapping[str, str]) -> Measured:
    size = 1000 - 100 * sum(p == "int8" for p in params.values())
    cost = sum(COST[name] for name, p in params.items() if p == "int8")
    return Measured(size, 2000 / size, 10 * (1 + cost), Increase(cost, 1e-4, 50), np.full(50, cost), 50)


def spec_of(folder: Path, sampler: str) -> StudySpec:
    (folder / "s.toml").write_text('[checkpoint]\npath = "m.pt"\n[search]\n' + ASKED)
    return load_spec(folder / "s.toml", [f"search.sampler={sampler}"])


def opened(folder: Path, sampler: str = "front", table: LatencyTable = TABLE) -> tuple[RunDirectory, OpenStudy]:
    run = RunDirectory(folder / "run")
    run.path.mkdir(exist_ok=True)
    return run, open_study(spec_of(folder, sampler), run, SPACE, {"checkpoint": "a"}, KNOWLEDGE, table)


def go(run: RunDirectory, study: OpenStudy, trials: int, tasks: list[Task] | None = None) -> None:
    """Let one worker evaluate until there are so many trials."""

    def evaluate(task: Task) -> Measured:
        (tasks if tasks is not None else []).append(task)
        return measured(task.params)

    owner = this_process()
    with lease(run / LEASES, owner):
        Worker(
            opened=study, run=run, space=SPACE, owner=owner, asked=trials, budget_percent=8.0, sampler="front",
            evaluate=evaluate, after=lambda finished: None, say=quiet, stop=Stop(),
        ).work()  # fmt: skip


@pytest.mark.parametrize("sampler", ["front", "tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow), "random"])
def test_every_sampler_works_on_three_objectives(tmp_path: Path, sampler: str) -> None:
    run, study = opened(tmp_path, sampler)
    go(run, study, 14)
    found = points(study.study, {**SPACE, "d": ("fp16",)})
    assert len({tuple(p.map.items()) for p in found}) == 14
    for trial, point in zip(study.study.trials, found, strict=True):
        assert point.latency == TABLE.predict(point.map) == trial.values[2]
        assert trial.values[:2] == [point.compression, point.increase_percent]
        assert point.to_json()["latency_seconds"] == point.latency
    best = {trial.number for trial in study.study.best_trials}
    assert {point.trial for point in pareto_front(found, 8.0)} <= best
    assert study.study.metric_names == ["compression", "increase_percent", "latency_seconds"]


def test_an_exhausted_study_has_the_front_of_all_maps(tmp_path: Path) -> None:
    run, study = opened(tmp_path, "random")
    go(run, study, 1000)
    every = [dict(zip(SPACE, held, strict=True)) for held in itertools.product(*SPACE.values())]
    values = {
        (m.bytes, m.increase.percent, TABLE.predict(held)) for held in every for m in [measured(held)]
        if m.increase.percent <= 8
    }  # fmt: skip
    unbeaten = {v for v in values if not any(w != v and all(a <= b for a, b in zip(w, v, strict=True)) for w in values)}
    front = pareto_front(points(study.study, SPACE), 8.0)
    assert {(p.bytes, p.increase_percent, p.latency) for p in front} == unbeaten
    assert 0 < len(front_by_size(front)) < len(front)


def test_only_maps_that_are_no_slower_are_rivals(tmp_path: Path) -> None:
    run, study = opened(tmp_path)
    tasks: list[Task] = []
    go(run, study, 14, tasks)
    finished = points(study.study, SPACE)
    for number, task in enumerate(tasks):
        own = TABLE.predict(task.params)
        known = sorted(p.bytes for p in finished[:number] if p.latency is not None and p.latency <= own)
        assert sorted(size for size, _ in task.rivals) == known
    fast = dict.fromkeys(SPACE, "fp16") | {"c0": "int8"}
    without = OpenStudy(study.study, study.choice, study._lock, quiet)
    assert len(rivals_of(study, fast)) < len(rivals_of(without, fast)) == 14


def test_a_slower_map_that_is_smaller_and_better_does_not_dominate(tmp_path: Path) -> None:
    _, study = opened(tmp_path)
    slow, fast = dict.fromkeys(SPACE, "fp16") | {"c1": "int8"}, dict.fromkeys(SPACE, "fp16") | {"c4": "int8"}
    assert TABLE.predict(slow) > TABLE.predict(fast)
    assert COST["c1"] < COST["c4"]
    enqueue(study.study, [Seed(slow, "slow")], SPACE)
    trial = claim(study, SPACE, Owner("gone", "elsewhere", "elsewhere", 1), 5, "front")
    assert isinstance(trial, Trial)
    assert tell(study, trial, measured(slow), 8.0, 1.0)
    size = measured(fast).bytes
    assert best_rival(size, rivals_of(study, fast)) is None
    assert best_rival(size, rivals_of(study, slow)) is not None


def test_a_study_with_another_table_is_refused(tmp_path: Path) -> None:
    run, study = opened(tmp_path)
    go(run, study, 2)
    other = LatencyTable(1, 128, "cpu", 1, 31, 9e-3, 6e-3, TABLE.seconds, TABLE.checks)
    with pytest.raises(StudyError, match="another latency table"):
        opened(tmp_path, table=other)
    opened(tmp_path)


def test_its_storage_knows_that_it_has_three_objectives(tmp_path: Path) -> None:
    run, study = opened(tmp_path)
    go(run, study, 1)
    assert json.loads((run / STORAGE).read_text())["latency"] is True
    assert len(read_study(run).directions) == 3
    two = load_spec(tmp_path / "s.toml", ['search.objectives=["compression", "perplexity"]'])
    with pytest.raises(StudyError, match="begun with latency"):
        open_study(two, run, SPACE, {"checkpoint": "a"}, KNOWLEDGE)


def test_a_map_that_is_stopped_early_has_its_latency_too(tmp_path: Path) -> None:
    _, study = opened(tmp_path)
    trial = claim(study, SPACE, Owner("gone", "elsewhere", "elsewhere", 1), 5, "front")
    assert isinstance(trial, Trial)
    whole = measured(trial.params)
    stopped = Measured(
        whole.bytes,
        whole.compression,
        whole.perplexity,
        Increase(0.3, 1e-3, 16),
        np.full(16, 0.3),
        50,
        "over budget",
        20.0,
    )
    assert tell(study, trial, stopped, 8.0, 1.0)
    found = points(study.study, SPACE)[0]
    assert (found.stopped, found.latency) == ("over budget", TABLE.predict(trial.params))
