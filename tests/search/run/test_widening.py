"""Studies whose space has grown: what is taken over, what is refused, and kills at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.errors import StudyError
from search.base.stop import Stop
from search.measure.objective import Measured
from search.measure.probe import planned
from search.problem.run_directory import FINGERPRINT, PROBES, RunDirectory, grown_in, require_same
from search.problem.spec import StudySpec, load_spec
from search.run.claim import Seed, claim, enqueue, queue
from search.run.one_worker import open_prepared
from search.run.prepare import prepare
from search.run.stored import stored_probes
from search.run.study import begin, open_study
from search.run.widening import check_or_widen, move_study, widened
from search.run.worker_loop import Worker
from search.sampling.sampler import Asked, make_sampler
from search.trials.attributes import FINISHED, MEASURED, REASON
from search.trials.maps import map_key, map_of
from search.trials.owner import LEASES, Owner, lease, living_leases, this_process
from search.trials.read_back import ASKED, counts, is_finished
from search.trials.storage import OpenStudy, connect, opened_as_it_is, stored_choice
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Increase
from tests.search.run import claiming
from tests.search.run.claiming import Deadly, Deaf, Killed
from tests.tiny import write_study

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


class Mortal(Deadly):
    """A worker that dies before one of all its writes, those to studies included."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("create_new_study", "delete_study"):
            return super().__getattr__(name)
        real = getattr(self.inner, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            self.writes += 1
            if self.fatal and self.writes >= self.fatal:
                raise Killed
            return real(*args, **kwargs)

        return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_move_that_is_killed_at_any_write_is_made_again_and_loses_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "0").mkdir()
    Place(tmp_path / "0", kind).searched()
    expected: list[Any] | None = None
    for fatal in range(1, 200):
        shutil.copytree(tmp_path / "0", tmp_path / str(fatal))
        place = Place(tmp_path / str(fatal), kind)
        opened = opened_as_it_is(place.run, place.spec(), quiet)
        storage = Mortal(opened.study._storage, fatal)
        survived = True
        try:
            move_study(claiming.through(opened, storage), place.run, BEFORE, NOW)
        except Killed:
            survived = False
            if place.connected().study.study_name == "precision search":  # not moved: the smaller space still stands
                assert counts(place.open(BEFORE).study).finished == 4
        found = trials(place.open(NOW))
        expected = expected or [kept(trial) for trial in found]
        assert [kept(trial) for trial in found] == expected
        assert place.run.space() == NOW
        if survived:
            assert fatal > len(found)
            return
    raise AssertionError("the move never came to its end")


def kept(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.values, map_of(trial), trial.user_attrs.get(MEASURED)


@pytest.mark.slow
def test_a_move_whose_answers_are_lost_is_repeated_and_happens_once(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    Place(tmp_path / "0", "journal").work(BEFORE, 3)
    for lost in range(1, 200):
        shutil.copytree(tmp_path / "0", tmp_path / str(lost))
        place = Place(tmp_path / str(lost), "journal")
        opened = claiming.as_on_a_server(opened_as_it_is(place.run, place.spec(), quiet))
        storage = Deaf(opened.study._storage, lost)
        unheard = claiming.through(opened, storage)
        study = unheard.patiently(lambda: move_study(unheard, place.run, BEFORE, NOW))  # noqa: B023
        assert study.study_name == "precision search, space 2"
        assert counts(place.open(NOW).study).finished == 3
        if storage.operations < lost:
            return
    raise AssertionError("the move never came to its end")


@pytest.mark.parametrize("name", ["append_lines", "write_json"])
def test_a_run_that_is_killed_after_its_study_has_moved_makes_up_for_the_rest(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, "journal")
    place.work(BEFORE, 4)

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, name, killed)
        with pytest.raises(Killed):
            place.open(NOW)
    assert place.run.read_json(FINGERPRINT)["space"] == BEFORE
    assert place.connected().study.study_name == "precision search, space 2"
    largest = {**NOW, "pinned": ["fp16", "int8"]}
    assert counts(place.open(NOW).study).finished == 4
    assert counts(place.open(largest).study).finished == 4


def test_a_run_whose_space_grew_while_it_was_cut_off_grows_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, "journal")
    place.work(BEFORE, 4)
    move_study(place.connected(), place.run, BEFORE, NOW)
    largest = {**NOW, "pinned": ["fp16", "int8"]}
    assert counts(place.open(largest).study).finished == 4
    assert place.connected().study.study_name == "precision search, space 3"


CHOICES = st.lists(st.sampled_from(["fp16", "int8", "nf4", "int4"]), min_size=1, max_size=4, unique=True)
SPACES = st.dictionaries(st.sampled_from("abc"), CHOICES, min_size=1)


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


def probes_of(run: RunDirectory) -> list[tuple[str, str, str]]:
    return [(line["probe"]["end"], line["probe"]["component"], line["probe"]["precision"])
            for line in run.read_lines(PROBES)]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "kept_ends"),
    [
        (["fp16", "int8"], ["fp16", "int8", "nf4"], {"widest"}),
        (["fp16", "int8", "nf4"], ["fp16", "int8", "nf4", "int3"], {"widest"}),
        (["fp16", "int8", "int3"], ["fp16", "int8", "nf4", "int3"], {"widest", "lowest"}),
    ],
)
def test_probes_are_kept_where_their_end_stands_and_others_measured(
    tmp_path: Path, before: list[str], now: list[str], kept_ends: set[str]
) -> None:
    run, said = RunDirectory(tmp_path / "run"), list[str]()

    def spec(choices: list[str]) -> StudySpec:
        return load_spec(write_study(tmp_path, extra=f"[precision]\nchoices = {choices}\n"))

    first = prepare(spec(before), run, quiet)
    measured_before = len(probes_of(run))
    prepared = prepare(spec(now), run, said.append)
    assert prepared.probes == prepare(spec(now), RunDirectory(tmp_path / "fresh"), quiet).probes
    valid = [probe for probe in first.probes if probe.end in kept_ends]
    assert f"{len(valid)} of {len(first.probes)} probes are taken over" in "\n".join(said)
    assert len(probes_of(run)) == measured_before + planned(prepared.workspace)
    prepare(spec(now), run, quiet)
    assert len(probes_of(run)) == measured_before + planned(prepared.workspace)
    shown = {(probe.end, probe.component, probe.precision): probe for probe in stored_probes(run, gradient=False)}
    assert [shown[probe.end, probe.component, probe.precision] for probe in prepared.probes] == prepared.probes
    assert len(shown) == len(stored_probes(run, gradient=False))


@pytest.mark.slow
def test_latencies_of_a_smaller_space_are_not_taken_over(tmp_path: Path) -> None:
    place = Place(tmp_path, "sqlite")
    place.run.path.mkdir()
    latency = load_spec(
        write_study(tmp_path), ['search.objectives=["compression", "perplexity", "latency"]', "search.trials=1"]
    )
    prepare(latency, place.run, quiet)
    open_prepared(latency, place.run, prepare(latency, place.run, quiet), quiet, many=False)
    wider = load_spec(
        tmp_path / "tiny.toml",
        [
            'search.objectives=["compression", "perplexity", "latency"]',
            'precision.choices=["fp16", "int8", "nf4", "int4", "int3"]',
        ],
    )
    with pytest.raises(StudyError, match="its latencies were measured for the smaller one"):
        prepare(wider, place.run, quiet)


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
