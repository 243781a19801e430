"""A Bayesian linear model of log-perplexity increase: effects, pair terms, and what the trials say of them.

Dimensions: `f` features (component, precision other than the widest), `t` observations, `m` maps.

    y(map) = offset + Σ effect_f + Σ pair_fg + noise,   over the features f, g that the map has

Prior: effect_f has the mean that is expected of it (a probe's, or the gradient's) and a spread in proportion to
its magnitude; effects of one precision may all be off by a common factor; pair_fg has mean zero and a spread in
proportion to both magnitudes, so that small effects hardly interact. Pair terms are never written out: under a
Gaussian prior they only enter through their covariance (Rasmussen & Williams 2006, section 2.1). How far the
spreads reach is learned from the observations by their marginal likelihood (section 5.4).

Every map is measured on the same windows, so differences between maps have far less noise than their standard
errors over FP32 say; those enter only where a trial was stopped before it had seen all windows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky

_OFFSET_SPREAD = 3.0
"""Prior standard deviation of the offset, in units of the mean effect."""
_FACTOR_SPREAD = 0.5
"""Prior standard deviation of the factor that a precision's effects may all be off by."""
_LEAST_MAGNITUDE = 0.1
"""A feature is taken to be at least this large, in units of the mean effect."""
_MOST_TO_LEARN_FROM = 128
"""Observations, evenly picked, that the spreads are learned from: the cost grows with their third power."""
_SPREADS, _PAIRS, _NOISES = (0.1, 0.3, 0.8, 1.6), (0.02, 0.1, 0.3, 0.8), (1e-3, 1e-2, 5e-2)


@dataclass(frozen=True, eq=False)
class Prior:
    """What is expected of each feature before any trial: mean `[f]` log-increase, and its group `[f]` (precision)."""

    mean: np.ndarray
    group: np.ndarray


@dataclass(frozen=True, eq=False)
class Observations:
    """Measured maps: features `[t, f]`, log-increase over FP32 `[t]`, variance of what is not yet seen `[t]`."""

    features: np.ndarray
    log_increase: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True)
class Spreads:
    """How far the prior reaches: of effects and pairs in proportion to magnitudes, of noise in mean effects."""

    effect: float
    pair: float
    noise: float


@dataclass(frozen=True, eq=False)
class Posterior:
    """The model after its observations. `unit` is the mean magnitude of an effect."""

    prior: Prior
    observed: Observations
    spreads: Spreads
    unit: float
    scale: np.ndarray
    factor: tuple[np.ndarray, bool]
    weights: np.ndarray

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the log-increase of maps `[m, f]` → `[m]` each."""
        across = _covariance(features, self.observed.features, self)
        mean = features @ self.prior.mean + across @ self.weights
        explained = np.einsum("mt,tm->m", across, cho_solve(self.factor, across.T))
        own = _own_variance(features, self)
        return mean, np.sqrt(np.maximum(own - explained, (1e-6 * self.unit) ** 2))

    def effects(self) -> tuple[float, np.ndarray]:
        """Posterior mean of the offset and of each effect, pair terms left out: a number and `[f]`."""
        offset = (_OFFSET_SPREAD * self.unit) ** 2 * self.weights.sum()
        return float(offset), self.prior.mean + self._back(self.weights)

    def leave_one_out(self) -> np.ndarray:
        """Log-increase of each observed map less what all the others predict of it, `[t]` (R. & W. equation 5.12)."""
        inverse = cho_solve(self.factor, np.eye(len(self.weights)))
        return np.asarray(self.weights / np.diag(inverse))

    def draw(self, rng: np.random.Generator) -> tuple[float, np.ndarray]:
        """One draw of offset and effects (Matheron's rule: a draw from the prior, moved by what it misses)."""
        offset = rng.normal() * _OFFSET_SPREAD * self.unit
        effects = self.prior.mean + rng.normal(size=self.scale.shape) * self.spreads.effect * self.scale
        for group in np.unique(self.prior.group):
            effects += np.where(self.prior.group == group, self.prior.mean, 0.0) * _FACTOR_SPREAD * rng.normal()
        seen = self.observed.features
        rest = _pairs(seen, seen, self) + np.diag(_noise(self.observed, self))
        imagined = offset + seen @ effects + _root(rest) @ rng.normal(size=len(seen))
        missed = cho_solve(self.factor, self.observed.log_increase - imagined)
        return float(offset + (_OFFSET_SPREAD * self.unit) ** 2 * missed.sum()), effects + self._back(missed)

    def _back(self, weights: np.ndarray) -> np.ndarray:
        """Cov(effects, observations) @ weights: `[t]` → `[f]`."""
        pulled = self.observed.features.T @ weights
        moved: np.ndarray = (self.spreads.effect * self.scale) ** 2 * pulled
        for group in np.unique(self.prior.group):
            mean = np.where(self.prior.group == group, self.prior.mean, 0.0)
            moved += _FACTOR_SPREAD**2 * mean * (mean @ pulled)
        return moved


def fit_posterior(prior: Prior, observed: Observations, spreads: Spreads | None = None) -> Posterior:
    """Condition the prior on observations; the spreads are learned from them unless they are given."""
    unit = float(np.abs(prior.mean).mean()) if prior.mean.size else 0.0
    unit = unit or 1e-3
    if spreads is not None:
        return _conditioned(prior, observed, spreads, unit)[0]
    count = len(observed.log_increase)
    picked = np.unique(np.linspace(0, count - 1, min(count, _MOST_TO_LEARN_FROM)).astype(int))
    some = Observations(observed.features[picked], observed.log_increase[picked], observed.variance[picked])
    candidates = [Spreads(*held) for held in itertools.product(_SPREADS, _PAIRS, _NOISES)]
    best = max(candidates, key=lambda spreads: _conditioned(prior, some, spreads, unit)[1])
    return _conditioned(prior, observed, best, unit)[0]


def _conditioned(prior: Prior, observed: Observations, spreads: Spreads, unit: float) -> tuple[Posterior, float]:
    """The posterior at given spreads, and the log marginal likelihood of the observations."""
    scale = np.maximum(np.abs(prior.mean), _LEAST_MAGNITUDE * unit)
    empty = (np.zeros((0, 0)), True)
    draft = Posterior(prior, observed, spreads, unit, scale, empty, np.zeros(0))
    seen = observed.features
    covariance = _covariance(seen, seen, draft) + np.diag(_noise(observed, draft))
    missed = observed.log_increase - seen @ prior.mean
    try:
        factor = cho_factor(covariance, lower=True)
    except LinAlgError:
        return draft, -np.inf
    weights = cho_solve(factor, missed)
    evidence = -0.5 * missed @ weights - np.log(np.diag(factor[0])).sum()
    return Posterior(prior, observed, spreads, unit, scale, factor, weights), float(evidence)


def _noise(observed: Observations, model: Posterior) -> np.ndarray:
    """Variance of each observation given offset, effects and pairs: `[t]`."""
    return np.asarray(observed.variance + (model.spreads.noise * model.unit) ** 2)


def _covariance(a: np.ndarray, b: np.ndarray, model: Posterior) -> np.ndarray:
    """Prior covariance of maps `[m, f]` and `[t, f]`: `[m, t]`."""
    total = (_OFFSET_SPREAD * model.unit) ** 2 + (a * (model.spreads.effect * model.scale) ** 2) @ b.T
    for group in np.unique(model.prior.group):
        mean = np.where(model.prior.group == group, model.prior.mean, 0.0)
        total = total + _FACTOR_SPREAD**2 * np.outer(a @ mean, b @ mean)
    return np.asarray(total + _pairs(a, b, model))


def _pairs(a: np.ndarray, b: np.ndarray, model: Posterior) -> np.ndarray:
    """Prior covariance of the sums of pair terms: Σ_{f<g} (spread² s_f s_g)/unit² … over shared pairs, `[m, t]`.

    A pair's standard deviation is `pair · √(s_f s_g)`, so the sum over pairs is (square of sum − sum of squares)/2.
    """
    shared = (a * model.scale) @ b.T
    alone = (a * model.scale**2) @ b.T
    return np.asarray(model.spreads.pair**2 * 0.5 * (shared**2 - alone))


def _own_variance(a: np.ndarray, model: Posterior) -> np.ndarray:
    """Prior variance of single maps: the diagonal of `_covariance(a, a)`, `[m]`."""
    total = (_OFFSET_SPREAD * model.unit) ** 2 + a @ (model.spreads.effect * model.scale) ** 2
    for group in np.unique(model.prior.group):
        total = total + (_FACTOR_SPREAD * (a @ np.where(model.prior.group == group, model.prior.mean, 0.0))) ** 2
    shared, alone = a @ model.scale, a @ model.scale**2
    return np.asarray(total + model.spreads.pair**2 * 0.5 * (shared**2 - alone))


def _root(covariance: np.ndarray) -> np.ndarray:
    """A lower Cholesky factor; the diagonal is raised a little where rounding has made it indefinite."""
    size = len(covariance)
    lift = 1e-12 * (np.trace(covariance) / size if size else 1.0)
    root: np.ndarray = cholesky(covariance + lift * np.eye(size), lower=True)
    return root
