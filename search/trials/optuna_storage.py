"""Optuna's private names, all of them in this one file: what a study has no public way for.

Trials that are written whole and at once, and trials that change under our own lock, go to the storage itself, whose
operations are public while the way to it (`study._storage`, `_study_id`, `_trial_id`) is not. Private names may change
with any minor version, one of them without an error, so pyproject.toml allows no other than `CHECKED_WITH`.
"""

from __future__ import annotations

import copy
from typing import Any

from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

CHECKED_WITH = "5.0"
"""Major and minor version of the Optuna that these names were checked with, by
tests/search/trials/test_optuna_storage.py."""


def storage_of(study: Study) -> BaseStorage:
    """What a study keeps its trials in."""
    return study._storage


def trial_id(trial: Trial | FrozenTrial) -> int:
    """A trial's id in its storage, which is not its number in the study."""
    return trial._trial_id


def create(study: Study, template: FrozenTrial) -> int:
    """Write a trial as it stands in one operation of the storage; returns its id."""
    return study._storage.create_new_trial(study._study_id, template_trial=template)


def handle(study: Study, created: int) -> Trial:
    """The trial of an id, as `create` and `trial_id` give it, to be evaluated and told."""
    return Trial(study, created)


def stored(study: Study, trial: Trial | FrozenTrial) -> FrozenTrial:
    """A trial as the storage holds it now."""
    return study._storage.get_trial(trial._trial_id)


def annotate(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a trial. Raises UpdateFinishedTrialError where it is finished."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def change_state(study: Study, trial: FrozenTrial, state: TrialState) -> bool:
    """Change a trial's state; False where it was to run and runs already."""
    return study._storage.set_trial_state_values(trial._trial_id, state)


class _Draft:
    """A storage for a trial that is not written yet: keeps what a sampler notes on it, and passes on all else."""

    def __init__(self, storage: BaseStorage) -> None:
        self._inner = storage
        self.attributes: dict[str, Any] = {}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.attributes[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def drafted(study: Study) -> tuple[Study, dict[str, Any]]:
    """The study for a sampler to propose to before there is a trial, and what it will have noted on that."""
    draft, copied = _Draft(study._storage), copy.copy(study)
    copied._storage = draft  # type: ignore[assignment]  # all that a sampler asks of a storage
    copied._thread_local.cached_all_trials = None  # as `ask` does
    return copied, draft.attributes


def known_offset(backend: JournalFileBackend, log_number: int) -> int | None:
    """Where a journal's line of this number begins, as far as the file has been read."""
    return backend._log_number_offset.get(log_number)
