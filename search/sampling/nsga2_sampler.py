"""The `nsga2` sampler: Optuna's, generations of maps that are crossed and mutated."""

from __future__ import annotations

from optuna.samplers import NSGAIISampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from search.sampling.sampler import Asked
from search.sampling.unrepeated import Unrepeated


class _Generations(NSGAIISampler):
    """Gives every trial its generation at once, or enqueued maps would never become parents."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)


def make(asked: Asked) -> Unrepeated:
    """The sampler of a study."""
    return Unrepeated(_Generations(population_size=16, seed=asked.seed), asked.space, asked.seed)
