"""Optuna's private names: that they are what they were, and that one file alone uses them."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from search.trials import optuna_storage as private

ROOT = Path(__file__).parents[3]
SPACE = {"c": CategoricalDistribution(("fp16", "int8"))}
WAITING = create_trial(state=TrialState.WAITING, params={"c": "int8"}, distributions=dict(SPACE), user_attrs={"a": 1})


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return optuna.create_study(storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal"))))


def storage_backend(study: Study) -> JournalFileBackend:
    storage = private.storage_of(study)
    assert isinstance(storage, JournalStorage)
    assert isinstance(storage._backend, JournalFileBackend)
    return storage._backend


def private_names(study: Study) -> set[str]:
    """Every private name that Optuna gives to a study, its trials, its storages and their backend."""
    database = optuna.storages.RDBStorage("sqlite://")
    held = [study, study.ask(), study.trials[0], private.storage_of(study), storage_backend(study), database]
    return {name for one in held for name in {*dir(one), *vars(one)} if re.match("_[^_]", name)}


def accesses(path: Path) -> Iterator[tuple[str, int]]:
    """Private attributes that a file reads or sets on anything but its own `self`, and those of Optuna's modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if isinstance(node, ast.Attribute) and not own:
            yield node.attr, node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
            parts = [*(node.module or "").split("."), *(name.name for name in node.names)]
            yield from ((f"{node.module}: {part}", node.lineno) for part in parts if part.startswith("_"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            named = node.args[1]
            if isinstance(named, ast.Constant):
                yield str(named.value), node.lineno


def test_only_one_file_touches_private_names_of_optuna(study: Study) -> None:
    names = private_names(study)
    assert {"_storage", "_study_id", "_trial_id", "_thread_local", "_log_number_offset"} <= names
    files = [*(ROOT / "search").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for name, line in accesses(path)
        if name in names or name.startswith("optuna")
    }
    at_home = {line for line in found if line.startswith("search/trials/optuna_storage.py:")}
    assert len(at_home) >= 5
    assert found == at_home, "Optuna's private names belong into search/trials/optuna_storage.py"


def test_the_dependency_allows_the_version_that_was_checked_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    major, minor = map(int, private.CHECKED_WITH.split("."))
    assert f"optuna>={major}.{minor},<{major}.{minor + 1}" in project["dependencies"]


def test_private_names_are_those_of_the_version_they_were_checked_with(study: Study) -> None:
    installed = version("optuna")
    advice = (
        f"Optuna {installed} is installed, search/trials/optuna_storage.py was checked with {private.CHECKED_WITH}: "
        "see what this version calls these, mend that file, and raise CHECKED_WITH and the bound in pyproject.toml"
    )
    missing = [
        name
        for holder, names in (
            (study, ("_storage", "_study_id", "_thread_local")),
            (study._thread_local, ("cached_all_trials",)),
            (study.ask(), ("_trial_id",)),
            (study.trials[0], ("_trial_id",)),
            (storage_backend(study), ("_log_number_offset",)),
        )
        for name in names
        if not hasattr(holder, name)
    ]
    assert not missing, f"gone: {', '.join(missing)}. {advice}"
    assert installed.startswith(f"{private.CHECKED_WITH}."), f"all names are still there. {advice}"


def test_a_trial_is_created_whole_found_and_changed(study: Study) -> None:
    study.ask()  # so that ids and numbers differ from those of a first trial
    created = private.create(study, WAITING)
    trial = study.trials[1]
    assert (private.trial_id(trial), trial.params, trial.user_attrs) == (created, {"c": "int8"}, {"a": 1})
    private.annotate(study, trial, "b", 2)
    assert private.change_state(study, trial, TrialState.RUNNING)
    assert not private.change_state(study, trial, TrialState.RUNNING)  # another has it
    running = private.stored(study, private.handle(study, created))
    assert (running.number, running.state, running.user_attrs) == (1, TrialState.RUNNING, {"a": 1, "b": 2})
    study.tell(private.handle(study, created), state=TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        private.annotate(study, trial, "b", 3)


def test_a_draft_keeps_what_is_noted_on_it_and_sees_what_others_write(study: Study) -> None:
    private.create(study, WAITING)
    draft, noted = private.drafted(study)
    assert len(draft.get_trials(deepcopy=False, states=(TrialState.WAITING,))) == 1
    private.create(study, WAITING)
    fresh, _ = private.drafted(study)
    assert len(fresh._get_trials(deepcopy=False, use_cache=True)) == 2  # as samplers read them
    private.storage_of(draft).set_trial_system_attr(0, "generation", 3)
    assert noted == {"generation": 3}
    assert study.trials[0].system_attrs == {}
    assert private.storage_of(study) is not private.storage_of(draft)
