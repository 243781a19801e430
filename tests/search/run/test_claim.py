"""Claims, tells and takeovers on real storages: whatever is interrupted where, nothing is lost and nothing doubled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search.base.stop import WorkInterruptedError
from search.measure.objective import Measured
from search.measure.racing import Reason
from search.run.claim import Idle, claim, enqueue, give_back, queue, take_over, tell
from search.run.study import reconsider
from search.run.worker_loop import Task
from search.trials.attributes import ATTEMPT, FIRST, ORIGIN, REASON
from search.trials.maps import map_key, map_of
from search.trials.owner import Owner
from search.trials.read_back import counts
from search.trials.storage import OpenStudy
from tests.search.run import claiming
from tests.search.run.claiming import BUDGET, SPACE, Bench, Deadly, measured, seeds

GONE = Owner("gone", "elsewhere", "elsewhere", 1)
"""A worker that was killed: nobody holds its lease."""
HERE = Owner("here", "elsewhere", "elsewhere", 2)
STOPS: tuple[Reason | None, ...] = (None, "over budget")
KINDS = pytest.mark.parametrize("kind", ["sqlite", "journal"])


def taken(opened: OpenStudy, owner: Owner = HERE, asked: int = 50) -> Trial:
    claimed = claim(opened, SPACE, owner, asked, "random")
    assert isinstance(claimed, Trial)
    return claimed


def lose(opened: OpenStudy) -> int:
    return take_over(opened, SPACE, lambda owners: owners & {GONE})


@pytest.mark.parametrize("sampler", ["front", "tpe", "nsga2", "random"])
@pytest.mark.parametrize(("kind", "workers"), [("sqlite", 1), ("journal", 1), ("journal", 3), ("journal", 8)])
def test_any_number_of_workers_finishes_exactly_n_different_maps(
    tmp_path: Path, kind: str, workers: int, sampler: str
) -> None:
    bench = Bench.at(tmp_path, kind, sampler=sampler)
    bench.work_together(workers, 41, seeds(5))
    maps = bench.require_whole(41)
    assert {map_key(seed.params) for seed in seeds(5)} <= {map_key(one) for one in maps}


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=pytest.mark.slow), "journal"])
def test_a_worker_killed_before_any_of_its_writes_costs_nothing(tmp_path: Path, kind: str) -> None:
    claiming.every_death(lambda folder: Bench.at(folder, kind), tmp_path, asked=3, queued=seeds(2))


def test_a_queue_longer_than_the_study_gives_the_same_maps_whoever_is_killed(tmp_path: Path) -> None:
    found = claiming.every_death(lambda folder: Bench.at(folder, "journal"), tmp_path, asked=3, queued=seeds(6))
    assert found == {frozenset(map_key(seed.params) for seed in seeds(3))}


def test_a_worker_killed_while_it_takes_over_or_gives_back_costs_nothing(tmp_path: Path) -> None:
    interrupted: list[str] = []

    def reluctant(task: Task) -> Measured:
        if map_key(task.params) not in interrupted:
            interrupted.append(map_key(task.params))
            raise WorkInterruptedError("SIGTERM")
        return measured(task.params)

    def left_by_another(folder: Path) -> Bench:
        interrupted.clear()
        bench = Bench.at(folder, "journal")
        opened = bench.opened()
        enqueue(opened.study, seeds(5), SPACE)
        for number in range(2):
            claim(opened, SPACE, replace(GONE, lease=f"gone {number}"), 5, "random")
        return bench

    found = claiming.every_death(left_by_another, tmp_path, asked=3, queued=seeds(5), evaluate=reluctant)
    assert found == {frozenset(map_key(seed.params) for seed in seeds(3))}


@pytest.mark.filterwarnings("ignore:The constraint value is ignored")  # it is set already: by the call that failed
def test_an_answer_that_was_lost_after_the_operation_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.trials.storage.time", claiming.IMPATIENT)
    claiming.every_lost_answer(lambda folder: Bench.at(folder, "journal"), tmp_path, asked=3, queued=seeds(2))


@KINDS
def test_the_result_of_a_worker_that_was_declared_dead_is_refused(tmp_path: Path, kind: str) -> None:
    bench = Bench.at(tmp_path, kind)
    opened = bench.opened()
    enqueue(opened.study, seeds(1), SPACE)
    zombies = taken(opened, GONE)
    assert lose(opened) == 1
    again = taken(opened)
    assert map_of(opened.study.trials[again.number]) == map_of(opened.study.trials[zombies.number])
    assert not tell(opened, zombies, measured(seeds(1)[0].params), BUDGET, 1.0)
    assert opened.study.trials[zombies.number].state == TrialState.FAIL
    assert tell(opened, again, measured(seeds(1)[0].params), BUDGET, 1.0)
    assert not tell(opened, zombies, measured(seeds(1)[0].params), BUDGET, 1.0)
    give_back(opened, zombies, SPACE, "too late")
    bench.require_whole(1)
    assert counts(opened.study).waiting == 0


def test_an_interrupted_map_goes_before_those_that_were_queued_after_it(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    enqueue(opened.study, seeds(4), SPACE)
    first, second = taken(opened, GONE), taken(opened, replace(GONE, lease="gone as well"))
    take_over(opened, SPACE, lambda owners: owners)
    assert [taken(opened, replace(HERE, lease=str(i))).params for i in range(4)] == [
        first.params, second.params, seeds(4)[2].params, seeds(4)[3].params,
    ]  # fmt: skip


def test_a_map_that_was_given_back_is_the_next_with_its_origin(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    enqueue(opened.study, seeds(3), SPACE)
    trial = taken(opened)
    give_back(opened, trial, SPACE, "given back on SIGTERM")
    give_back(opened, trial, SPACE, "given back twice")  # its answer was lost
    again = opened.study.trials[taken(opened).number]
    assert (again.params, again.user_attrs[ORIGIN]) == (seeds(3)[0].params, "seed 0")
    assert (again.user_attrs[FIRST], again.user_attrs[ATTEMPT]) == (trial.number, 2)
    assert opened.study.trials[trial.number].user_attrs[REASON] == "given back on SIGTERM"
    assert counts(opened.study).waiting == 2


def test_a_map_that_was_interrupted_ten_times_is_given_up_with_that_reason(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    enqueue(opened.study, seeds(1), SPACE)
    for attempt in range(1, 11):
        assert taken(opened, GONE).params == seeds(1)[0].params, attempt
        assert lose(opened) == 1
    found = counts(opened.study)
    assert (found.failed, found.waiting) == (10, 0)
    assert found.reasons["interrupted 10 times, and given up"] == 1
    assert taken(opened).params != seeds(1)[0].params


@pytest.mark.parametrize("interruptions", [1, 2])
def test_a_map_that_a_larger_budget_tries_again_survives_being_interrupted(tmp_path: Path, interruptions: int) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    enqueue(opened.study, seeds(1), SPACE)
    full = measured(seeds(1)[0].params)
    tell(opened, taken(opened), replace(full, stopped="over budget", lower_percent=6.0), BUDGET, 1.0)
    assert reconsider(opened.study, SPACE, 7.0) == 1
    for _ in range(interruptions):
        assert taken(opened, GONE).params == seeds(1)[0].params
        assert lose(opened) == 1
    assert taken(opened).params == seeds(1)[0].params


def test_no_more_trials_run_at_once_than_are_missing(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    owners = [replace(HERE, lease=str(i)) for i in range(4)]
    first, _ = (taken(opened, owner, asked=2) for owner in owners[:2])
    assert claim(opened, SPACE, owners[2], 2, "random") is Idle.wait
    assert tell(opened, first, "not finite", BUDGET, 1.0)
    tell(opened, taken(opened, owners[2], asked=2), measured(seeds(1)[0].params), BUDGET, 1.0)
    assert claim(opened, SPACE, owners[3], 2, "random") is Idle.wait
    assert claim(opened, SPACE, owners[3], 1, "random") is Idle.finished


def test_a_worker_has_one_trial_however_often_it_claims(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    enqueue(opened.study, seeds(2), SPACE)
    assert taken(opened)._trial_id == taken(opened)._trial_id
    assert counts(opened.study).running == 1


def test_a_map_that_two_workers_claimed_without_the_lock_is_evaluated_once(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    study, mine = opened.study, taken(opened)
    other = replace_owner(study.trials[mine.number], GONE)  # as after a lock that a restarted server has let go
    study._storage.create_new_trial(study._study_id, template_trial=other)
    assert taken(opened).params != mine.params
    assert taken(opened, GONE).params == mine.params
    assert counts(study).reasons == {"claimed by another worker as well": 1}
    assert counts(study).running == 2


def replace_owner(trial: FrozenTrial, owner: Owner) -> FrozenTrial:
    return create_trial(
        state=trial.state,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**trial.user_attrs, "owner": owner.to_json()},
    )


@pytest.mark.parametrize("stopped", STOPS)
def test_a_map_that_was_queued_twice_without_the_lock_is_evaluated_once(tmp_path: Path, stopped: Reason | None) -> None:
    bench = Bench.at(tmp_path, "journal")
    opened = bench.opened()
    for seed in (*seeds(3), *seeds(3)):  # as by two workers, one of whose locks a restarted server has let go
        queue(opened.study, seed, SPACE)
    bench.work(6, seeds(3), evaluate=lambda task: replace(measured(task.params), stopped=stopped))
    bench.require_whole(6)
    assert counts(opened.study).reasons == {"queued twice": 3}
    assert counts(opened.study).waiting == 0


def test_a_map_that_was_queued_twice_is_not_lost_with_the_worker_of_the_first(tmp_path: Path) -> None:
    opened = Bench.at(tmp_path, "journal").opened()
    for seed in (*seeds(1), *seeds(1)):
        queue(opened.study, seed, SPACE)
    assert taken(opened, GONE).params == seeds(1)[0].params
    assert lose(opened) == 1
    assert taken(opened).params == seeds(1)[0].params
    assert counts(opened.study).waiting == 0


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_proposal_is_written_in_one_operation(tmp_path: Path, sampler: str) -> None:
    bench = Bench.at(tmp_path, "journal", sampler=sampler)
    bench.work(20)
    opened = bench.opened()
    counted = Deadly(opened.study._storage)
    assert taken(claiming.through(opened, counted)).params.keys() == SPACE.keys()
    assert counted.writes == 1


def test_proposals_of_nsga2_carry_their_generation(tmp_path: Path) -> None:
    bench = Bench.at(tmp_path, "journal", sampler="nsga2")
    bench.work(40, seeds(3))
    proposed = bench.opened().study.trials[3:]
    held = [[value for key, value in t.system_attrs.items() if key.endswith("generation")] for t in proposed]
    assert len(held) == 37
    assert all(len(one) == 1 for one in held)
    assert {one[0] for one in held} == {0, 1, 2}


def test_a_study_that_had_all_maps_says_so(tmp_path: Path) -> None:
    bench = Bench.at(tmp_path, "journal")
    assert bench.work(1000) == "exhausted"
    bench.require_whole(2**7)
