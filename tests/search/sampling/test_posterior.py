"""The Bayesian linear model against its definition in full, and on data of its own kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from search.sampling.posterior import Observations, Posterior, Prior, Spreads, fit_posterior

RNG = np.random.default_rng(3)
PRIOR = Prior(np.array([0.01, 0.02, 0.004, 0.03, 0.008]), np.array([0, 0, 1, 1, 1]))
SPREADS = Spreads(0.5, 0.3, 0.01)


def observations(count: int, truth: np.ndarray, pairs: np.ndarray) -> Observations:
    features = RNG.integers(0, 2, (count, 5)).astype(float)
    crossed = np.einsum("ti,ij,tj->t", features, np.triu(pairs, 1), features)
    return Observations(features, 0.001 + features @ truth + crossed, np.zeros(count))


def in_full(features: np.ndarray) -> np.ndarray:
    """Features, all pairs written out, and the offset."""
    pairs = [features[:, i] * features[:, j] for i, j in itertools.combinations(range(5), 2)]
    return np.column_stack([np.ones(len(features)), features, *pairs])


def test_prediction_is_that_of_the_model_with_all_pairs_written_out() -> None:
    seen = observations(12, PRIOR.mean * 1.3, np.full((5, 5), 0.001))
    posterior = fit_posterior(PRIOR, seen, SPREADS)
    unit = np.abs(PRIOR.mean).mean()
    scale = np.abs(PRIOR.mean)
    mean = np.concatenate([[0.0], PRIOR.mean, np.zeros(10)])
    pairs = [SPREADS.pair**2 * scale[i] * scale[j] for i, j in itertools.combinations(range(5), 2)]
    covariance = np.diag(np.concatenate([[(3 * unit) ** 2], (SPREADS.effect * scale) ** 2, pairs]))
    for group in (0, 1):
        held = np.concatenate([[0.0], np.where(PRIOR.group == group, PRIOR.mean, 0.0), np.zeros(10)])
        covariance += 0.5**2 * np.outer(held, held)
    full, new = in_full(seen.features), in_full(np.array(list(itertools.product((0.0, 1.0), repeat=5))))
    noise = (SPREADS.noise * unit) ** 2 * np.eye(12)
    gain = covariance @ full.T @ np.linalg.inv(full @ covariance @ full.T + noise)
    after = mean + gain @ (seen.log_increase - full @ mean)
    spread = covariance - gain @ full @ covariance
    found, stddev = posterior.predict(np.array(list(itertools.product((0.0, 1.0), repeat=5))))
    assert found == pytest.approx(new @ after, abs=1e-9)
    expected = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", new, spread, new), (1e-6 * unit) ** 2))
    assert stddev == pytest.approx(expected, abs=1e-8)
    assert posterior.effects()[1] == pytest.approx(after[1:6], abs=1e-9)
    assert posterior.effects()[0] == pytest.approx(after[0], abs=1e-9)


def test_draws_have_the_mean_and_the_spread_of_the_posterior() -> None:
    posterior = fit_posterior(PRIOR, observations(4, PRIOR.mean, np.zeros((5, 5))), SPREADS)
    draws = np.array([posterior.draw(RNG)[1] for _ in range(4000)])
    assert draws.mean(axis=0) == pytest.approx(posterior.effects()[1], abs=4 * draws.std(axis=0).max() / np.sqrt(4000))
    again = np.array([posterior.draw(RNG)[1] for _ in range(4000)])
    assert draws.std(axis=0) == pytest.approx(again.std(axis=0), rel=0.1)
    prior = fit_posterior(PRIOR, Observations(np.zeros((0, 5)), np.zeros(0), np.zeros(0)), SPREADS)
    wide = np.array([prior.draw(RNG)[1] for _ in range(2000)])
    assert (wide.std(axis=0) > draws.std(axis=0) - 1e-4).all()


def test_leaving_one_out_is_fitting_without_it() -> None:
    seen = observations(9, PRIOR.mean, np.full((5, 5), 0.002))
    posterior = fit_posterior(PRIOR, seen, SPREADS)
    for left in (0, 4, 8):
        rest = np.arange(9) != left
        without = Observations(seen.features[rest], seen.log_increase[rest], seen.variance[rest])
        mean, _ = fit_posterior(PRIOR, without, SPREADS).predict(seen.features[[left]])
        assert posterior.leave_one_out()[left] == pytest.approx(seen.log_increase[left] - mean[0], abs=1e-9)


def test_many_trials_overrule_a_wrong_prior() -> None:
    truth = np.array([0.03, 0.002, 0.02, 0.001, 0.015])
    posterior = fit_posterior(PRIOR, observations(60, truth, np.zeros((5, 5))))
    every = np.array(list(itertools.product((0.0, 1.0), repeat=5)))
    mean, stddev = posterior.predict(every)
    assert mean == pytest.approx(0.001 + every @ truth, abs=2e-4)
    assert (stddev < 2e-3).all()


def test_pair_terms_are_learned_where_effects_do_not_add_up() -> None:
    pairs = np.full((5, 5), 0.01)
    posterior = fit_posterior(PRIOR, observations(60, PRIOR.mean, pairs))
    assert posterior.spreads.pair > 0.1
    every = np.array(list(itertools.product((0.0, 1.0), repeat=5)))
    expected = 0.001 + every @ PRIOR.mean + np.einsum("ti,ij,tj->t", every, np.triu(pairs, 1), every)
    assert posterior.predict(every)[0] == pytest.approx(expected, abs=1e-3)


def test_a_map_with_unseen_windows_counts_for_less() -> None:
    seen = observations(6, PRIOR.mean, np.zeros((5, 5)))

    def pulled(variance: float) -> Posterior:
        values = np.concatenate([seen.log_increase, [0.5]])
        features = np.concatenate([seen.features, np.ones((1, 5))])
        return fit_posterior(PRIOR, Observations(features, values, np.append(seen.variance, variance)), SPREADS)

    assert pulled(1.0).predict(np.ones((1, 5)))[0][0] < pulled(1e-8).predict(np.ones((1, 5)))[0][0]
