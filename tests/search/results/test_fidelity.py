"""What is said of a winner beside its perplexity."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from search.base.fidelity import fidelity_from_json
from search.results.fidelity import fidelity_of
from ssm_mp.evaluation.compare import Departure
from ssm_mp.evaluation.evaluate import Evaluation

TOKENS = 10


def of(rises: np.ndarray, kl: np.ndarray, changed: np.ndarray) -> tuple[Departure, Evaluation]:
    """Windows of 10 tokens; rises and divergences in nats a token."""
    fp32 = np.linspace(20, 30, rises.size)
    return Departure(fp32 + TOKENS * rises, TOKENS, TOKENS * kl, changed), Evaluation(fp32, TOKENS)


def test_means_and_errors_are_over_windows() -> None:
    rng = np.random.default_rng(0)
    kl, changed = rng.gamma(2, 0.01, 25), rng.integers(0, 4, 25).astype(float)
    found = fidelity_of(*of(rng.normal(0.01, 0.02, 25), kl, changed))
    assert (found.windows, found.tokens) == (25, 250)
    assert found.kl_nats == pytest.approx(kl.mean())
    assert found.kl_stderr_nats == pytest.approx(kl.std(ddof=1) / 5)
    assert found.changed == pytest.approx(changed.sum() / 250)
    assert found.changed_stderr == pytest.approx((changed / 10).std(ddof=1) / 5)
    low, high = found.changed_interval
    assert high - low == pytest.approx(2 * 1.96 * found.changed_stderr)


@pytest.mark.parametrize(("windows", "worst"), [(10, 1), (11, 2), (20, 2), (2, 1)])
def test_the_worst_tenth_are_the_windows_that_rose_most(windows: int, worst: int) -> None:
    rises, kl = np.full(windows, 0.01), np.full(windows, 0.02)
    rises[-worst:], kl[-worst:] = 0.5, 0.7
    order = np.random.default_rng(1).permutation(windows)
    found = fidelity_of(*of(rises[order], kl[order], np.zeros(windows)))
    assert found.worst_windows == worst
    assert found.worst_increase_percent == pytest.approx(100 * math.expm1(0.5))
    assert found.worst_kl_nats == pytest.approx(0.7)


def test_a_share_stays_between_none_and_all() -> None:
    some = np.array([0.0, 0.0, 0.0, 1.0])
    assert fidelity_of(*of(some, some, some)).changed_interval[0] == 0.0
    assert fidelity_of(*of(some, some, TOKENS - some)).changed_interval[1] == 1.0


def test_one_window_has_no_error_and_goes_through_json() -> None:
    one = np.array([0.1])
    found = fidelity_of(*of(one, one, one))
    assert found.kl_stderr_nats == math.inf
    text = json.dumps(found.to_json(), allow_nan=False)
    assert fidelity_from_json(json.loads(text)) == found


def test_documents_that_differ_widen_both_intervals_and_are_told() -> None:
    rng, sources = np.random.default_rng(0), np.arange(60) // 5
    alike = np.repeat(rng.gamma(2, 0.01, 12), 5)
    departure = of(alike, alike, np.round(100 * alike))
    by_windows, by_documents = fidelity_of(*departure), fidelity_of(*departure, sources)
    assert by_documents.documents == 12
    assert "60 windows of 12 documents" in by_documents.lines()[0]
    means = alike[::5]
    of_means = means.std(ddof=1) / math.sqrt(12)  # windows of a document say the same: there are twelve values
    assert by_documents.kl_reach_documents_nats == pytest.approx(2.201 * of_means, rel=1e-3)  # t, 11 degrees of freedom
    (low, high), (lower, higher) = by_windows.changed_interval, by_documents.changed_interval
    assert lower < low < high < higher
    assert fidelity_from_json(json.loads(json.dumps(by_documents.to_json()))) == by_documents


def test_too_few_documents_say_nothing_of_others() -> None:
    some = np.random.default_rng(0).gamma(2, 0.01, 55)
    departure = of(some, some, np.round(100 * some))
    assert fidelity_of(*departure, np.arange(55) // 5) == fidelity_of(*departure)
