"""What a sampler is: asked for the next map of a study, it proposes one that the study does not have.

A study file says which by name; `SAMPLERS` (search/problem/spec.py) has the file of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study

from search.problem.spec import SAMPLERS
from search.sampling.knowledge import Knowledge


@dataclass(frozen=True)
class Asked:
    """What a sampler is made for: the free components' choices, and what is known before the first trial.

    knowledge: of the effects, None where nobody has measured any; no two samplers of a study have the same seed.
    """

    space: Mapping[str, CategoricalDistribution]
    seed: int
    knowledge: Knowledge | None = None
    budget_percent: float = 5.0


@dataclass(frozen=True)
class Proposal:
    """A map to evaluate: a trial's parameters, and system attributes that the sampler wants on it."""

    params: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Proposer(Protocol):
    """A sampler that proposes whole maps, for trials that are written in one operation."""

    def propose(self, study: Study) -> Proposal | None:
        """The next map; None where every map is evaluated, queued or running."""

    def forget(self, proposal: Proposal) -> None:
        """That a proposal became no trial."""


class SamplerFile(Protocol):
    """What the file of a sampler defines; the sampler is a `Proposer` as well as one of Optuna's."""

    def make(self, asked: Asked) -> BaseSampler:
        """A new sampler."""


def make_sampler(name: str, asked: Asked) -> BaseSampler:
    """The sampler that a study file names."""
    return cast(SamplerFile, import_module(SAMPLERS[name])).make(asked)


def proposer(study: Study) -> Proposer:
    """The sampler of a study of ours."""
    sampler = study.sampler
    assert isinstance(sampler, Proposer)
    return sampler
