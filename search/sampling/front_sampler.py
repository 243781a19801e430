"""The `front` sampler: proposes the map with the largest expected growth of the front."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.base.certifiable import alike_near, certifiable_percent, expected
from search.sampling.knowledge import Knowledge
from search.sampling.posterior import Posterior, Spreads
from search.sampling.proposal import Evaluated, propose, random_map
from search.sampling.sampler import Asked, Proposal
from search.trials.attributes import DIFFERENCES, FINISHED, MEASURED, log_increase, unpacked
from search.trials.maps import map_of

_REFIT_EVERY = 8
"""Trials after which the spreads of the prior are learned anew."""


def make(asked: Asked) -> FrontSampler:
    """The sampler of a study that knows its space."""
    assert asked.knowledge is not None
    return FrontSampler(asked.knowledge, asked.budget_percent, asked.seed)


class FrontSampler(BaseSampler):
    """Conditions the surrogate on all finished trials of the storage and proposes by expected hypervolume gain.

    Queued and running maps, of whichever worker, are never proposed again. Every component is an ordinary
    categorical parameter. `propose` gives a whole map at once, for a trial that is written in one operation;
    under `study.ask` or `study.optimize` it works like any other sampler.
    """

    def __init__(self, knowledge: Knowledge, budget_percent: float, seed: int) -> None:
        self._knowledge = knowledge
        self._budget = budget_percent
        self._rng = np.random.default_rng(seed)
        self._spreads: Spreads | None = None
        self._learned_at = -_REFIT_EVERY
        self._lock = threading.Lock()
        self._proposed: set[bytes] = set()
        self._rows: dict[int, np.ndarray] = {}

    def propose(self, study: Study) -> Proposal | None:
        """The next map; None where every map is evaluated, queued or running."""
        with self._lock:
            found = self._propose(study.get_trials(deepcopy=False))
        return None if found is None else Proposal(found)

    def forget(self, proposal: Proposal) -> None:
        """That a proposal became no trial: it may be proposed again."""
        with self._lock:
            self._proposed.discard(self._knowledge.catalogue.encode(proposal.params).tobytes())

    def _propose(self, trials: Sequence[FrozenTrial]) -> dict[str, str] | None:
        catalogue = self._knowledge.catalogue
        complete = {*catalogue.names}
        known = [trial for trial in trials if set(map_of(trial)) == complete]
        finished = [trial for trial in known if trial.state in FINISHED]
        under_way = [trial for trial in known if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
        taken = {row.tobytes(): row for row in self._choices(under_way)}
        # proposals of this process whose trial other threads have not written yet
        self._proposed -= {row.tobytes() for row in self._choices(known)}
        taken |= {key: np.frombuffer(key, dtype=np.int64) for key in self._proposed}
        full = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        off = [trial for trial in known if trial.state in (TrialState.PRUNED, TrialState.FAIL)]
        evaluated = Evaluated(self._choices(full), np.array([_increase_percent(trial) for trial in full]))
        # what was stopped early or failed is not on the front: never again, but no part of the staircase
        found = propose(
            catalogue, self.posterior(finished), evaluated, list(taken.values()), self._budget, self._rng,
            excluded=list(self._choices(off)), certifiable_percent=self._certifiable(full),
        )  # fmt: skip
        if found is None:
            return None
        self._proposed.add(found.tobytes())
        return catalogue.decode(found)

    def _certifiable(self, full: Sequence[FrozenTrial]) -> float | None:
        """The increase up to which maps are likely to be certified, from the spread of those near the budget."""
        measured = [trial.user_attrs[MEASURED] for trial in full if MEASURED in trial.user_attrs]
        certifying = self._knowledge.certifying
        if certifying is None or not measured:
            return None
        nearest = min(measured, key=lambda held: abs(held["increase_percent"] - self._budget))
        own = nearest["stderr_percent"] / (100 + nearest["increase_percent"])
        differences = [unpacked(trial.user_attrs[DIFFERENCES]) for trial in full if DIFFERENCES in trial.user_attrs]
        known = replace(certifying, alike=alike_near(differences, certifying.searched, self._budget))
        return certifiable_percent(self._budget, expected(own, nearest["windows"], known).above)

    def posterior(self, finished: Sequence[FrozenTrial]) -> Posterior:
        """The surrogate after finished trials."""
        values = np.array([_observed(trial) for trial in finished]).reshape(-1, 2)
        refit = self._spreads is None or len(finished) >= self._learned_at + _REFIT_EVERY
        spreads = None if refit else self._spreads
        found = self._knowledge.posterior(self._choices(finished), values[:, 0], values[:, 1], spreads)
        if refit:
            self._spreads, self._learned_at = found.spreads, len(finished)
        return found

    def _choices(self, trials: Sequence[FrozenTrial]) -> np.ndarray:
        """Choices `[t, n]` of trials, each encoded once: a trial's map never changes."""
        catalogue = self._knowledge.catalogue
        for trial in trials:
            if trial.number not in self._rows:
                self._rows[trial.number] = catalogue.encode(map_of(trial))
        rows = [self._rows[trial.number] for trial in trials]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(catalogue.names))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        catalogue = self._knowledge.catalogue
        pairs = zip(catalogue.names, catalogue.precisions, strict=True)
        return {name: CategoricalDistribution(precisions) for name, precisions in pairs}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:
            return {}  # an enqueued map: nothing to propose
        found = self.propose(study)
        return dict(found.params) if found is not None else self._knowledge.catalogue.decode(
            random_map(self._knowledge.catalogue, self._rng)
        )  # fmt: skip

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        assert isinstance(param_distribution, CategoricalDistribution)
        return param_distribution.choices[int(self._rng.integers(len(param_distribution.choices)))]


def _increase_percent(trial: FrozenTrial) -> float:
    """Second value of a finished trial: its increase in percent."""
    assert trial.values is not None
    return float(trial.values[1])


def _observed(trial: FrozenTrial) -> tuple[float, float]:
    """Log-increase and the variance of unseen windows; trials of a foreign objective carry their values alone."""
    if MEASURED in trial.user_attrs:
        return log_increase(trial.user_attrs[MEASURED])
    return float(np.log1p(_increase_percent(trial) / 100)), 0.0
