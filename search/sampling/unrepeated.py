"""The samplers of a study: Optuna's own, kept from proposing a map twice."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.sampling.front_sampler import FrontSampler, Proposal
from search.sampling.knowledge import Knowledge
from search.trials.attributes import map_of
from search.trials.optuna_storage import drafted

_ATTEMPTS = 4
"""Proposals asked of the inner sampler before the last of them is varied instead."""


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


class Proposer(Protocol):
    """A sampler that proposes whole maps, for trials that are written in one operation."""

    def propose(self, study: Study) -> Proposal | None:
        """The next map; None where every map is evaluated, queued or running."""

    def forget(self, proposal: Proposal) -> None:
        """That a proposal became no trial."""


def proposer(study: Study) -> Proposer:
    """The sampler of a study of ours."""
    sampler = study.sampler
    assert isinstance(sampler, FrontSampler | Unrepeated)
    return sampler


class Unrepeated(BaseSampler):
    """Proposes through another sampler, over the whole space at once, and never a map that the study has.

    Where the inner sampler keeps repeating itself, its last proposal is varied one component after another
    until the map is new. The caller stops once the space is exhausted.
    """

    def __init__(self, inner: BaseSampler, space: dict[str, CategoricalDistribution], seed: int) -> None:
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
        if isinstance(self._inner, NSGAIISampler):
            # gives the trial its generation, or enqueued maps would never become parents
            self._inner.get_trial_generation(study, trial)

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


def make_sampler(
    name: str,
    space: dict[str, CategoricalDistribution],
    seed: int,
    knowledge: Knowledge | None = None,
    budget_percent: float = 5.0,
) -> BaseSampler:
    """The sampler of a study by its name in the study file: `front`, which needs `knowledge`, or one of Optuna's."""
    if name == "front":
        assert knowledge is not None
        return FrontSampler(knowledge, budget_percent, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner: BaseSampler
        if name == "tpe":
            inner = TPESampler(multivariate=True, seed=seed)
        elif name == "nsga2":
            inner = NSGAIISampler(population_size=16, seed=seed)
        elif name == "gp":
            inner = GPSampler(seed=seed)
        else:
            inner = RandomSampler(seed=seed)
    return Unrepeated(inner, space, seed)
