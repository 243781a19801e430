"""The `tpe` sampler: Optuna's, densities of good and bad maps over all components together."""

from __future__ import annotations

import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler

from search.sampling.sampler import Asked
from search.sampling.unrepeated import Unrepeated


def make(asked: Asked) -> Unrepeated:
    """The sampler of a study."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return Unrepeated(TPESampler(multivariate=True, seed=asked.seed), asked.space, asked.seed)
