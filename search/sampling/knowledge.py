"""What a study knows of its space before and besides its trials: prior, probes, and the catalogue they speak of.

Dimensions: `f` features, `t` observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.base.certifiable import Certifying
from search.sampling.catalogue import Catalogue, Choices
from search.sampling.posterior import Observations, Posterior, Prior, Spreads, fit_posterior


@dataclass(frozen=True, eq=False)
class Knowledge:
    """A prior over effects, and maps that were measured before any trial: choices `[t, n]`, log-increase `[t]`.

    The measured maps are both ends and the probes from them; none of them need be a trial. certifying: how the winner
    will be certified, None where it will not.
    """

    catalogue: Catalogue
    prior: Prior
    choices: Choices
    log_increase: np.ndarray
    certifying: Certifying | None = None

    def posterior(
        self, choices: Choices, log_increase: np.ndarray, variance: np.ndarray, spreads: Spreads | None = None
    ) -> Posterior:
        """The model given further measured maps; `variance [t]` is that of the windows which they have not seen."""
        features = self.catalogue.one_hot(np.concatenate([self.choices, choices]))
        observed = Observations(
            features,
            np.concatenate([self.log_increase, log_increase]),
            np.concatenate([np.zeros(len(self.log_increase)), variance]),
        )
        return fit_posterior(self.prior, observed, spreads)


def make_prior(catalogue: Catalogue, effects: Mapping[str, Mapping[str, float]]) -> Prior:
    """The prior of expected effects: component → precision → log-increase; those of one precision share a factor."""
    mean = [effects[catalogue.names[c]][catalogue.precisions[c][k]] for c, k in catalogue.features]
    precisions = sorted({name for held in catalogue.precisions for name in held})
    group = [precisions.index(catalogue.precisions[c][k]) for c, k in catalogue.features]
    return Prior(np.array(mean), np.array(group, dtype=np.int64))


def before_any_trial(
    catalogue: Catalogue,
    effects: Mapping[str, Mapping[str, float]],
    measured: Sequence[tuple[Mapping[str, str], float]] = (),
) -> Knowledge:
    """Knowledge of expected effects and of measured maps (a trial's parameters, log-increase over FP32)."""
    rows = [catalogue.encode(params) for params, _ in measured]
    choices = np.array(rows, dtype=np.int64).reshape(len(rows), len(catalogue.names))
    return Knowledge(catalogue, make_prior(catalogue, effects), choices, np.array([y for _, y in measured]))
