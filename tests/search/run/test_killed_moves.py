"""Kills at any moment while a study moves into a larger space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from search.problem.run_directory import FINGERPRINT, RunDirectory
from search.run.widening import move_study
from search.trials.attributes import MEASURED
from search.trials.maps import map_of
from search.trials.read_back import counts
from search.trials.storage import opened_as_it_is
from tests.search.run import claiming
from tests.search.run.claiming import Deadly, Deaf, Killed
from tests.search.run.growing import BEFORE, KINDS, NOW, Place, quiet, trials


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


def kept(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.values, map_of(trial), trial.user_attrs.get(MEASURED)


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
