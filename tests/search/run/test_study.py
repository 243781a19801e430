"""The Optuna study: real SQLite files, no model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import Trial, TrialState

from search.base.errors import StudyError
from search.base.front import pareto_front
from search.base.stop import Stop
from search.measure.objective import Measured
from search.problem.run_directory import RunDirectory
from search.problem.spec import SAMPLERS, StudySpec, load_spec
from search.run.claim import Seed, claim, enqueue
from search.run.study import open_study, reconsider
from search.run.worker_loop import Worker, take_over_lost
from search.sampling.catalogue import Catalogue
from search.sampling.knowledge import before_any_trial
from search.trials.maps import map_key
from search.trials.owner import LEASES, Owner, lease, this_process
from search.trials.read_back import counts, finished_differences, points
from search.trials.storage import OpenStudy
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Increase

SPACE = {f"c{i}": ("fp16", "int8") for i in range(5)}
COST = {f"c{i}": 0.004 * (i + 1) for i in range(5)}
PRINT = {"checkpoint": "a"}
EVERYTHING = {**SPACE, "pinned": ("fp16",)}
CATALOGUE = Catalogue(tuple(SPACE), tuple(SPACE.values()), ((200, 100),) * 5, 0, 2000)
GONE = Owner("gone", "elsewhere", "elsewhere", 1)
"""A worker that was killed: nobody holds its lease."""
KNOWLEDGE = before_any_trial(CATALOGUE, {name: {"fp16": 0.0, "int8": 2 * cost} for name, cost in COST.items()})


def measured(params: Mapping[str, str]) -> Measured:
    size = 1000 - 100 * sum(p == "int8" for p in params.values())
    cost = sum(COST[name] for name, p in params.items() if p == "int8")
    return Measured(size, 2000 / size, 10 * (1 + cost), Increase(cost, 1e-4, 50), np.full(50, cost), 50)


def opened(folder: Path, sampler: str = "tpe", trials: int = 20) -> tuple[StudySpec, RunDirectory, OpenStudy]:
    study = folder / "s.toml"
    study.write_text('[checkpoint]\npath = "m.pt"\n')
    spec = load_spec(study, [f"search.sampler={sampler}", f"search.trials={trials}"])
    run = RunDirectory(folder / "run")
    run.path.mkdir(exist_ok=True)
    return spec, run, open_study(spec, run, SPACE, PRINT, KNOWLEDGE)


def go(
    study: OpenStudy, run: RunDirectory, trials: int, evaluate: Callable[[Mapping[str, str]], Measured] = measured
) -> list[bool]:
    """Let one worker evaluate until there are so many trials."""
    told: list[bool] = []
    owner = this_process()
    with lease(run / LEASES, owner):
        Worker(
            opened=study, run=run, space=SPACE, owner=owner, asked=trials, budget_percent=5.0, sampler="x",
            evaluate=lambda task: evaluate(task.params), after=told.append, say=lambda line: None, stop=Stop(),
        ).work()  # fmt: skip
    return told


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_exactly_n_different_maps(tmp_path: Path, sampler: str) -> None:
    _, run, opened_ = opened(tmp_path, sampler)
    go(opened_, run, 26)
    found = points(opened_.study, EVERYTHING)
    assert len(found) == 26
    assert len({map_key(p.map) for p in found}) == 26
    assert all(set(p.map) == set(EVERYTHING) for p in found)


def test_a_continued_study_adds_to_what_is_there(tmp_path: Path) -> None:
    spec, run, opened_ = opened(tmp_path)
    go(opened_, run, 8)
    first = points(opened_.study, EVERYTHING)
    again = open_study(spec, run, SPACE, PRINT, KNOWLEDGE)
    assert go(again, run, 8) == []
    go(again, run, 14)
    found = points(again.study, EVERYTHING)
    assert found[:8] == first
    assert len({map_key(p.map) for p in found}) == 14


def test_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path)
    go(opened_, run, 1000)
    found = points(opened_.study, EVERYTHING)
    assert len(found) == 2**5
    exact = sorted(
        (measured(dict(zip(SPACE, chosen, strict=True))).bytes for chosen in itertools.product(*SPACE.values())),
    )
    assert sorted(p.bytes for p in found) == exact


def test_seeds_come_first_and_only_once(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path)
    seeds = [Seed(dict.fromkeys(SPACE, "fp16"), "a"), Seed(dict.fromkeys(SPACE, "int8"), "b")]
    assert enqueue(opened_.study, [*seeds, Seed(dict.fromkeys(SPACE, "fp16"), "again")], SPACE) == 2
    go(opened_, run, 4)
    assert [p.origin for p in points(opened_.study, EVERYTHING)] == ["a", "b", "x", "x"]
    assert enqueue(opened_.study, seeds, SPACE) == 0


def test_a_trial_killed_in_the_middle_is_tried_again(tmp_path: Path) -> None:
    spec, run, opened_ = opened(tmp_path)
    enqueue(opened_.study, [Seed(dict.fromkeys(SPACE, "int8"), "b")], SPACE)

    def killed(params: Mapping[str, str]) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(opened_, run, 3, killed)
    again = open_study(spec, run, SPACE, PRINT, KNOWLEDGE)
    assert counts(again.study).running == 1
    assert take_over_lost(again, run, SPACE, lambda line: None) == 1
    go(again, run, 3)
    found = points(again.study, EVERYTHING)
    assert len(found) == 3
    assert Counter(p.origin for p in found)["b"] == 1
    assert counts(again.study).reasons == {"interrupted, and tried again": 1}
    assert counts(again.study).running == 0


def test_a_trial_killed_before_its_map_was_complete_costs_nothing(tmp_path: Path) -> None:
    spec, run, opened_ = opened(tmp_path)
    enqueue(opened_.study, [Seed(dict.fromkeys(SPACE, "int8"), "b")], SPACE)
    claim(opened_, SPACE, GONE, 40, "x")  # killed at once: the queued map must not be lost
    partial = opened_.study.ask()
    partial.suggest_categorical("c0", ("fp16", "int8"))
    again = open_study(spec, run, SPACE, PRINT, KNOWLEDGE)
    assert take_over_lost(again, run, SPACE, lambda line: None) == 2
    go(again, run, 2**5)
    found = points(again.study, EVERYTHING)
    assert len(found) == 2**5
    assert next(p.origin for p in found) == "b"
    assert take_over_lost(again, run, SPACE, lambda line: None) == 0


def test_enqueued_maps_become_parents_of_nsga2(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path, "nsga2")
    enqueue(opened_.study, [Seed(dict.fromkeys(SPACE, "int8"), "b")], SPACE)
    go(opened_, run, 1)
    assert any("generation" in key for key in opened_.study.trials[0].system_attrs)


def test_a_database_with_another_fingerprint_is_refused(tmp_path: Path) -> None:
    spec, run, opened_ = opened(tmp_path)
    go(opened_, run, 1)
    with pytest.raises(StudyError, match="another checkpoint"):
        open_study(spec, run, SPACE, {"checkpoint": "b"})


def test_a_map_that_cannot_be_evaluated_fails_with_its_reason(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path)

    def picky(params: Mapping[str, str]) -> Measured:
        if params["c0"] == "int8":
            raise EvaluationError("not finite")
        return measured(params)

    enqueue(opened_.study, [Seed(dict.fromkeys(SPACE, "int8"), "b")], SPACE)
    told = go(opened_, run, 5, picky)
    assert told.count(True) == 5
    assert told.count(False) == counts(opened_.study).failed >= 1
    assert set(counts(opened_.study).reasons) == {"not finite"}


def test_a_study_in_which_everything_fails_ends_with_the_reason(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path)

    def hopeless(params: Mapping[str, str]) -> Measured:
        raise EvaluationError("not finite")

    with pytest.raises(EvaluationError, match="20 trials all failed: not finite"):
        go(opened_, run, 5, hopeless)


def test_a_map_that_was_stopped_early_counts_but_is_never_on_the_front(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path, "front")

    def raced(params: Mapping[str, str]) -> Measured:
        full = measured(params)
        if params["c0"] == "fp16":
            return full
        return replace(full, increase=Increase(full.increase.log_mean, 1e-3, 16), stopped="dominated")

    go(opened_, run, 14, raced)
    found = points(opened_.study, EVERYTHING)
    state = counts(opened_.study)
    assert len(found) == state.finished == 14
    assert state.stopped == sum(p.stopped is not None for p in found) > 0
    assert {p.windows for p in found if p.stopped} == {16}
    assert all(p.map["c0"] == "fp16" for p in pareto_front(found, 5.0))
    assert len(finished_differences(opened_.study)) == 14 - state.stopped


def test_a_proposal_of_front_is_written_in_one_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, opened_ = opened(tmp_path, "front")
    go(opened_, run, 3)
    writes: list[str] = []
    for name in ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_system_attr"):
        real = getattr(opened_.study._storage, name)

        def counted(*args: object, name: str = name, real: Callable[..., object] = real, **kwargs: object) -> object:
            writes.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(opened_.study._storage, name, counted)
    trial = claim(opened_, SPACE, GONE, 40, "front")
    assert isinstance(trial, Trial)
    assert writes == ["create_new_trial"]
    assert set(trial.params) == set(SPACE)
    assert optuna.importance.get_param_importances(opened_.study, target=lambda t: t.values[1]).keys() == SPACE.keys()


def test_a_map_that_an_older_version_queued_is_evaluated_as_it_was_queued(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path, "front")
    opened_.study.enqueue_trial(dict.fromkeys(SPACE, "int8"))
    go(opened_, run, 1)
    assert points(opened_.study, EVERYTHING)[0].map == {**dict.fromkeys(SPACE, "int8"), "pinned": "fp16"}


def test_a_larger_budget_tries_again_what_a_smaller_one_stopped(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path, "front")

    def raced(params: Mapping[str, str]) -> Measured:
        full = measured(params)
        over = full.increase.percent > 2
        return replace(full, stopped="over budget", lower_percent=full.increase.percent) if over else full

    go(opened_, run, 20, raced)
    stopped = [p for p in points(opened_.study, EVERYTHING) if p.stopped]
    reopened = sum(p.increase_percent <= 4 for p in stopped)
    assert len(stopped) > reopened > 0
    assert reconsider(opened_.study, SPACE, 2.0) == 0
    assert reconsider(opened_.study, SPACE, 4.0) == reopened
    assert reconsider(opened_.study, SPACE, 4.0) == 0
    go(opened_, run, 20 + reopened)
    again = [p for p in points(opened_.study, EVERYTHING) if p.trial >= 20]
    assert len(again) == reopened
    assert all(2 < p.increase_percent <= 4 and p.stopped is None for p in again)


def test_the_budget_is_a_constraint_that_optuna_knows(tmp_path: Path) -> None:
    _, run, opened_ = opened(tmp_path)
    go(opened_, run, 2**5)
    for trial in opened_.study.get_trials(states=(TrialState.COMPLETE,)):
        increase = trial.user_attrs["measured"]["increase_percent"]
        assert trial.constraints == {"budget": pytest.approx(increase - 5.0)}
        assert trial.values[1] == increase
    best = {t.number for t in opened_.study.best_trials}
    assert {p.trial for p in pareto_front(points(opened_.study, EVERYTHING), 5.0)} <= best


def test_a_study_that_was_never_run_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(StudyError, match="no search has been run"):
        run.require()


def test_a_changed_fingerprint_is_refused_and_says_what_changed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.owned():
        run.check_fingerprint({"checkpoint": "a", "scheme": {"activations": "static"}})
        run.check_fingerprint({"checkpoint": "a", "scheme": {"activations": "static"}})
        with pytest.raises(StudyError, match=r"another scheme \(activations: 'static' → 'none'\)"):
            run.check_fingerprint({"checkpoint": "a", "scheme": {"activations": "none"}})
        with pytest.raises(StudyError, match="another checkpoint"):
            run.check_fingerprint({"checkpoint": "b", "scheme": {"activations": "static"}})


def test_a_run_directory_has_one_owner(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").owned():
        with pytest.raises(StudyError, match="another process"), RunDirectory(tmp_path / "run").owned():
            pass
    with RunDirectory(tmp_path / "run").owned():
        pass


def test_a_run_that_came_to_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").owned():
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_came_to_nothing_removes_only_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with RunDirectory(tmp_path / "empty").owned():
        pass
    assert (tmp_path / "empty").is_dir()
    with RunDirectory(tmp_path / "run").owned():
        (tmp_path / "run/locks/keys.txt").write_text("mine")
    assert (tmp_path / "run/locks/keys.txt").read_text() == "mine"


def test_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_lines("probes.jsonl", [{"a": 1}])
    with (tmp_path / "probes.jsonl").open("a") as file:
        file.write('{"a": ')
    assert run.read_lines("probes.jsonl") == [{"a": 1}]
    run.append_lines("probes.jsonl", [{"a": 2}])
    assert run.read_lines("probes.jsonl") == [{"a": 1}, {"a": 2}]


def test_trials_without_their_fingerprint_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "study.db").touch()
    with pytest.raises(StudyError, match="nobody knows what study.db belongs to"):
        run.check_fingerprint({"checkpoint": "a"})
