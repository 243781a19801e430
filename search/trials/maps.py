"""The maps of a study's trials: which one a trial has, whether two are the same, and which the study has seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


def map_of(trial: FrozenTrial) -> dict[str, Any]:
    """The free components' precisions of a trial in any state."""
    queued = trial.system_attrs.get("fixed_params", {})  # as an older version queued maps
    return dict(queued if len(queued) > len(trial.params) else trial.params)


def map_key(params: Mapping[str, Any]) -> str:
    """One text a map, to compare maps by."""
    return json.dumps(dict(params), sort_keys=True)


def seen_maps(study: Study) -> set[str]:
    """Keys of all maps that a study evaluated, is evaluating, or will."""
    seen = set()
    for trial in study.get_trials(deepcopy=False):
        seen.add(map_key(map_of(trial) if trial.state == TrialState.WAITING else trial.params))
    return seen


def complete_maps(study: Study, space: Iterable[str]) -> set[str]:
    """Keys of the maps in `seen_maps` that name every free component; a kill can leave part of one."""
    names = set(space)
    return {key for key in seen_maps(study) if set(json.loads(key)) == names}
