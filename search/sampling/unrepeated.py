"""A sampler of Optuna's, kept from proposing a map twice."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import prod
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.sampling.sampler import Proposal
from search.trials.maps import map_key, map_of
from search.trials.optuna_storage import drafted

_ATTEMPTS = 4
"""Proposals asked of the inner sampler before the last of them is varied instead."""


class Unrepeated(BaseSampler):
    """Proposes through another sampler, over the whole space at once, and never a map that the study has.

    Where the inner sampler keeps repeating itself, its last proposal is varied one component after another
    until the map is new. The caller stops once the space is exhausted.
    """

    def __init__(self, inner: BaseSampler, space: Mapping[str, CategoricalDistribution], seed: int) -> None:
        self._inner = inner
        self._space: dict[str, BaseDistribution] = dict(space)
        self._random = random.Random(seed)
        self._keys: dict[int, str] = {}

    def propose(self, study: Study) -> Proposal | None:
        """The next map, with the attributes that the inner sampler notes on a trial (NSGA-II its generation)."""
        if len(self._seen(study)) >= prod(len(_choices(held)) for held in self._space.values()):
            return None
        draft, noted = drafted(study)
        params = self.sample_relative(draft, create_trial(state=TrialState.RUNNING), self._space)
        return Proposal(params, noted)

    def forget(self, proposal: Proposal) -> None:
        """Nothing to forget: what it has proposed is read from the study."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:
            return {}  # an enqueued map: nothing to propose
        seen = self._seen(study)
        proposal: dict[str, Any] = {}
        for _ in range(_ATTEMPTS):
            # what the inner sampler leaves open (NSGA-II's mutations, start-up trials) is drawn at random
            proposal = {**self._any(), **self._inner.sample_relative(study, trial, search_space)}
            if map_key(proposal) not in seen:
                return proposal
        while map_key(proposal) in seen:
            name = self._random.choice(sorted(self._space))
            proposal = {**proposal, name: self._random.choice(_choices(self._space[name]))}
        return proposal

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.choice(_choices(param_distribution))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def _seen(self, study: Study) -> set[str]:
        """Keys of all complete maps of a study, each made once: such a map never changes."""
        for trial in study.get_trials(deepcopy=False):
            if trial.number not in self._keys and set(chosen := map_of(trial)) == self._space.keys():
                self._keys[trial.number] = map_key(chosen)
        return set(self._keys.values())

    def _any(self) -> dict[str, Any]:
        """A map at random."""
        return {name: self._random.choice(_choices(held)) for name, held in self._space.items()}


def _choices(distribution: BaseDistribution) -> list[Any]:
    assert isinstance(distribution, CategoricalDistribution)
    return list(distribution.choices)
