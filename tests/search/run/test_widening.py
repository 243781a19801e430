"""Studies whose space has grown: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from search.base.errors import StudyError
from search.base.stop import Stop
from search.problem.run_directory import RunDirectory, grown_in, require_same
from search.problem.spec import StudySpec, load_spec
from search.run.claim import Seed, enqueue
from search.run.one_worker import open_prepared
from search.run.prepare import prepare
from search.run.study import begin
from search.run.widening import check_or_widen, widened
from search.run.worker_loop import Worker
from search.sampling.sampler import Asked, make_sampler
from search.trials.attributes import FINISHED, REASON
from search.trials.maps import map_key, map_of
from search.trials.owner import LEASES, lease, living_leases, this_process
from search.trials.read_back import ASKED, counts, is_finished
from tests.search.run.growing import BEFORE, KINDS, NOW, Place, every, fingerprint, free, measured, quiet, trials
from tests.tiny import write_study

CHOICES = st.lists(st.sampled_from(["fp16", "int8", "nf4", "int4"]), min_size=1, max_size=4, unique=True)
SPACES = st.dictionaries(st.sampled_from("abc"), CHOICES, min_size=1)


def seen(trial: FrozenTrial) -> dict[str, Any]:
    """All that must stay as it was."""
    when = [at and at.replace(tzinfo=None) for at in (trial.datetime_start, trial.datetime_complete)]
    return {
        "number": trial.number, "state": trial.state, "values": trial.values, "user": trial.user_attrs, "when": when,
        "system": trial.system_attrs, "map": {"d": "fp16", **map_of(trial)},
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_trials_are_taken_over_with_their_numbers_and_all_they_carry(tmp_path: Path, kind: str) -> None:
    place, said = Place(tmp_path, kind), list[str]()
    before = trials(place.searched())
    after = trials(place.open(NOW, said.append))
    lost = next(trial for trial in before if trial.state == TrialState.RUNNING)
    assert [seen(trial) for trial in after if trial.number < len(before) and trial.number != lost.number] == [
        seen(trial) for trial in before if trial.number != lost.number
    ]
    assert after[lost.number].state == TrialState.FAIL  # its worker is gone, and its map is queued again
    assert [map_of(trial)["d"] for trial in after[len(before) :]] == ["fp16"]
    larger = {name: CategoricalDistribution(choices) for name, choices in free(NOW).items()}
    assert all(trial.distributions == larger for trial in after)
    assert "a: + nf4; d: + nf4" in said[-1]
    assert "4 finished trials, which count" in said[-1]
    assert place.run.space() == NOW


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "gp"])
def test_a_study_goes_on_in_the_larger_space_to_its_end(tmp_path: Path, kind: str, sampler: str) -> None:
    place = Place(tmp_path, kind)
    place.searched()
    opened = place.open(NOW)
    distributions = {name: CategoricalDistribution(choices) for name, choices in free(NOW).items()}
    opened.study.sampler = make_sampler(sampler, Asked(distributions, 0))
    owner = this_process()
    with lease(place.run / LEASES, owner):
        Worker(
            opened=opened, run=place.run, space=free(NOW), owner=owner, asked=99, budget_percent=5.0, sampler=sampler,
            evaluate=lambda task: measured(task.params), after=lambda finished: None, say=quiet, stop=Stop(),
        ).work()  # fmt: skip
    finished = [trial for trial in trials(opened) if trial.state in (*FINISHED, TrialState.FAIL)]
    found = {map_key(map_of(trial)) for trial in finished if trial.user_attrs.get(REASON, "not finite") == "not finite"}
    assert found == {map_key(one) for one in every(NOW)}
    done = [map_key(map_of(trial)) for trial in trials(opened) if trial.state in FINISHED]
    assert len(done) == len(set(done))


def test_what_a_larger_space_queues_comes_on_top_of_what_is_finished(tmp_path: Path) -> None:
    place = Place(tmp_path, "journal")
    place.work(BEFORE, 5)
    opened = place.open(NOW)
    lowest = Seed({"a": "nf4", "b": "int8", "c": "int8", "d": "nf4"}, "lowest")
    assert begin(opened, [lowest], free(NOW), 5, 5.0) == 6
    assert begin(opened, [lowest], free(NOW), 5, 5.0) == 6
    assert begin(opened, [lowest], free(NOW), 12, 5.0) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_more_trials_or_a_larger_budget_continue_a_study(tmp_path: Path, kind: str) -> None:
    place = Place(tmp_path, kind)
    two = Seed({"a": "int8", "b": "fp16", "c": "int8"}, "stopped")
    first = [seen(trial) for trial in trials(place.work(BEFORE, 3, [two]))]
    more = place.work(BEFORE, 5)
    assert counts(more.study).finished == 5
    assert [seen(trial) for trial in trials(more)][: len(first)] == first
    assert begin(more, [], free(BEFORE), 5, 5.0) == 5
    maps = [map_of(trial) for trial in trials(more) if trial.state == TrialState.PRUNED]
    assert maps  # two components lowered: over 5 %, and perhaps within 8 %
    assert begin(more, [], free(BEFORE), 5, 8.0) == 5 + len(maps)
    assert [map_of(trial) for trial in trials(more) if trial.state == TrialState.WAITING] == maps


def test_a_space_grows_more_than_once(tmp_path: Path) -> None:
    place = Place(tmp_path, "journal")
    first = trials(place.work(BEFORE, 4))
    second = trials(place.work(NOW, 8))
    third = {**NOW, "pinned": ["fp16", "int8"]}
    held = trials(place.open(third))
    assert [trial.number for trial in held] == [trial.number for trial in second]
    assert [map_of(trial)["pinned"] for trial in held] == ["fp16"] * len(held)
    assert [trial.values for trial in held[: len(first)]] == [trial.values for trial in first]


@pytest.mark.parametrize(
    "other",
    [
        {**BEFORE, "a": ["fp16", "nf4"]},
        {**BEFORE, "a": ["fp16"]},
        {name: held for name, held in NOW.items() if name != "d"},
        {**NOW, "e": ["fp16", "int8"]},
    ],
)
def test_a_space_that_loses_something_is_refused_and_nothing_changes(tmp_path: Path, other: dict[str, Any]) -> None:
    place = Place(tmp_path, "sqlite")
    place.work(BEFORE, 4)
    with pytest.raises(StudyError, match=r"another space \(.*\).*may get more choices, never lose any"):
        place.open(other)
    assert place.run.space() == BEFORE
    assert counts(place.open(BEFORE).study).finished == 4


def test_a_larger_space_with_another_checkpoint_is_refused_and_says_both(tmp_path: Path) -> None:
    place = Place(tmp_path, "sqlite")
    place.work(BEFORE, 4)
    with pytest.raises(StudyError, match="another checkpoint, another space"):
        check_or_widen(place.spec(), place.run, {**fingerprint(NOW), "checkpoint": "y"}, quiet)
    assert place.run.space() == BEFORE


def test_the_smaller_space_is_refused_once_the_study_has_moved(tmp_path: Path) -> None:
    place = Place(tmp_path, "journal")
    place.work(BEFORE, 4)
    place.open(NOW)
    with pytest.raises(StudyError, match="another space"):
        place.open(BEFORE)


def test_commands_that_take_nothing_over_name_the_one_that_does() -> None:
    with pytest.raises(StudyError, match="`ssm-mp search` takes its trials over into the larger space"):
        require_same(fingerprint(BEFORE), fingerprint(NOW), "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_at_work_keeps_the_study_where_it_is(tmp_path: Path, kind: str) -> None:
    place = Place(tmp_path, kind)
    opened = place.work(BEFORE, 4)
    owner = this_process()
    with lease(place.run / LEASES, owner):
        with pytest.raises(StudyError, match=f"still at work on it .{owner.lease}"):
            place.open(NOW)
        assert living_leases(place.run / LEASES) == [owner.lease]
        assert begin(opened, [], free(BEFORE), 4, 5.0) == 4
    assert place.run.space() == BEFORE
    assert counts(place.open(NOW).study).finished == 4


def test_a_worker_that_opened_the_study_before_it_moved_does_not_begin(tmp_path: Path) -> None:
    place = Place(tmp_path, "journal")
    late = place.work(BEFORE, 4)
    place.open(NOW)
    with pytest.raises(StudyError, match="has just grown"):
        begin(late, [], free(BEFORE), 9, 5.0)


def test_a_trial_of_a_living_worker_elsewhere_keeps_the_study_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, "journal")
    place.searched()
    monkeypatch.setattr("search.run.widening.dead_owners", lambda owners, folder: set())  # the queue does not answer
    with pytest.raises(StudyError, match="a trial is running"):
        place.open(NOW)


def test_a_worker_is_not_told_that_all_is_done_where_its_study_file_asks_for_more(tmp_path: Path) -> None:
    place = Place(tmp_path, "journal")
    opened = place.work(BEFORE, 5)
    assert is_finished(opened.study, place.spec(5))
    assert not is_finished(opened.study, place.spec(6))
    wider = load_spec(tmp_path / "s.toml", ['precision.choices=["fp16", "int8", "nf4"]', "search.trials=5"])
    assert not is_finished(opened.study, wider)


@given(SPACES, st.data())
def test_any_map_of_a_space_is_one_of_any_larger_space(before: dict[str, list[str]], data: st.DataObject) -> None:
    now = {name: [*held, *(p for p in data.draw(CHOICES) if p not in held)] for name, held in before.items()}
    assert grown_in(fingerprint(before), fingerprint(now)) == (before != now)
    params = {name: data.draw(st.sampled_from(held)) for name, held in free(before).items()}
    trial = FrozenTrial(
        number=3, trial_id=7, state=TrialState.WAITING, value=None, datetime_start=None, datetime_complete=None,
        params=params, distributions={n: CategoricalDistribution(c) for n, c in free(before).items()},
        user_attrs={"x": 1}, system_attrs={}, intermediate_values={},
    )  # fmt: skip
    moved = widened(trial, before, now)
    assert trial.params == params  # as it was
    assert {name: moved.params.get(name, now[name][0]) for name in now} == {
        name: params.get(name, before[name][0]) for name in before
    }
    assert moved.params.keys() == free(now).keys()
    assert moved.distributions == {name: CategoricalDistribution(choices) for name, choices in free(now).items()}


@given(SPACES, SPACES)
def test_a_space_has_grown_only_where_every_component_keeps_what_it_had(
    before: dict[str, list[str]], now: dict[str, list[str]]
) -> None:
    kept_all = before.keys() == now.keys() and all(set(before[name]) <= set(now[name]) for name in before)
    assert grown_in(fingerprint(before), fingerprint(now)) == (kept_all and before != now)
    assert not grown_in(fingerprint(before), fingerprint(now, scheme="other"))


def test_a_space_without_choices_below_8_bits_may_get_them_and_another_rounding_may_not_come_with_them() -> None:
    wide, narrow = {"a": ["fp16", "int8"]}, {"a": ["fp16", "int8", "nf4"]}
    narrower = {"a": ["fp16", "int8", "nf4", "int3"]}
    rules = [{"rounding": {"rule": rule, "version": 1}} for rule in ("nearest", "compensated")]
    for rule in rules:
        assert grown_in(fingerprint(wide), {**fingerprint(narrow), **rule})
        assert grown_in({**fingerprint(narrow), **rule}, {**fingerprint(narrower), **rule})
        assert not grown_in(fingerprint(narrow), {**fingerprint(narrower), **rule})  # of version 0.4
    assert not grown_in({**fingerprint(narrow), **rules[0]}, {**fingerprint(narrower), **rules[1]})


def test_a_study_that_gets_choices_below_8_bits_goes_on_with_its_trials(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")

    def spec(choices: list[str]) -> StudySpec:
        return load_spec(write_study(tmp_path, extra=f"[precision]\nchoices = {choices}\n"), ["search.trials=2"])

    for choices in (["fp16", "int8"], ["fp16", "int8", "nf4"], ["fp16", "int8", "nf4", "int3"]):
        for _ in range(2):
            found = spec(choices)
            open_prepared(found, run, prepare(found, run, quiet), quiet, many=False)
        assert ("rounding" in run.fingerprint()) == (len(choices) > 2)


def test_a_queued_map_of_an_older_version_is_completed(tmp_path: Path) -> None:
    place = Place(tmp_path, "sqlite")
    opened = place.open(BEFORE)
    opened.study.enqueue_trial({"a": "int8", "b": "fp16", "c": "fp16"})
    (trial,) = trials(place.open(NOW))
    assert map_of(trial) == {"a": "int8", "b": "fp16", "c": "fp16", "d": "fp16"}
    assert trial.state == TrialState.WAITING


def test_a_study_that_asked_for_trials_asks_anew_in_the_larger_space(tmp_path: Path) -> None:
    place = Place(tmp_path, "sqlite")
    opened = place.work(BEFORE, 4)
    assert opened.study.user_attrs[ASKED]["asked"] == 4
    assert ASKED not in place.open(NOW).study.user_attrs


def test_seeds_that_are_there_already_are_not_queued_again_in_the_larger_space(tmp_path: Path) -> None:
    place = Place(tmp_path, "sqlite")
    widest = Seed(dict.fromkeys("abc", "fp16"), "uniform fp16")
    place.work(BEFORE, 3, [widest])
    assert enqueue(place.open(NOW).study, [Seed(dict.fromkeys("abcd", "fp16"), "uniform fp16")], free(NOW)) == 0
