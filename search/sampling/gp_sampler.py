"""The `gp` sampler: Optuna's, a Gaussian process over the maps."""

from __future__ import annotations

import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import GPSampler

from search.sampling.sampler import Asked
from search.sampling.unrepeated import Unrepeated


def make(asked: Asked) -> Unrepeated:
    """The sampler of a study."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return Unrepeated(GPSampler(seed=asked.seed), asked.space, asked.seed)
