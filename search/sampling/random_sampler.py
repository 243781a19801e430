"""The `random` sampler: maps drawn evenly."""

from __future__ import annotations

from optuna.samplers import RandomSampler

from search.sampling.sampler import Asked
from search.sampling.unrepeated import Unrepeated


def make(asked: Asked) -> Unrepeated:
    """The sampler of a study."""
    return Unrepeated(RandomSampler(seed=asked.seed), asked.space, asked.seed)
