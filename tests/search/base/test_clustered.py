from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.base.clustered import Clustered, clustered, correlation
from search.results.certify import bounds, clustered_bounds
from tests.search.results.test_certify import increase_of


@settings(deadline=None)
@given(st.integers(3, 200), st.integers(0, 999), st.floats(0.001, 0.4))
def test_with_clusters_of_one_window_the_bounds_are_those_over_windows(count: int, seed: int, error: float) -> None:
    rng = np.random.default_rng(seed)
    differences = rng.gamma(0.5, size=count)
    found = clustered_bounds(clustered(differences, rng.permutation(count) - 7), error)
    assert found == pytest.approx(bounds(increase_of(differences), error))


def by_hand(differences: np.ndarray, sources: np.ndarray) -> tuple[float, float]:
    """Mean, and standard error, window by window in plain loops."""
    total, mean = 0.0, sum(differences) / len(differences)
    for source in set(sources.tolist()):
        of = [d - mean for d, s in zip(differences, sources, strict=True) if s == source]
        total += sum(of) ** 2 / (1 - len(of) / len(differences))
    return mean, total**0.5 / len(differences)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 9)), min_size=2, max_size=60))
def test_mean_and_standard_error_are_those_by_hand(drawn: list[tuple[float, int]]) -> None:
    differences, sources = np.array([d for d, _ in drawn]), np.array([s for _, s in drawn])
    found = clustered(differences, sources)
    if len(set(sources.tolist())) < 2:
        assert found.log_stderr == np.inf
        return
    assert (found.log_mean, found.log_stderr) == pytest.approx(by_hand(differences, sources), abs=1e-12)
    assert found.clusters == len(set(sources.tolist()))
    assert -1e-9 <= found.freedom <= found.clusters - 1 + 1e-9


def alike(clusters: int, size: int, correlated: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean 0 and variance 1, and their sources."""
    sources = np.repeat(np.arange(clusters), size)
    shared = rng.normal(size=clusters)[sources]
    return correlated**0.5 * shared + (1 - correlated) ** 0.5 * rng.normal(size=sources.size), sources


def test_windows_that_resemble_each_other_widen_the_bound() -> None:
    rng = np.random.default_rng(0)
    wider = []
    for _ in range(200):
        differences, sources = alike(24, 20, 0.2, rng)
        upper = clustered_bounds(clustered(differences / 100, sources), 0.05)[1]
        wider.append(upper - bounds(increase_of(differences / 100), 0.05)[1])
    assert np.mean(np.array(wider) > 0) > 0.98


def test_the_correlation_within_clusters_is_found() -> None:
    rng = np.random.default_rng(1)
    for correlated in (0.0, 0.1, 0.4):
        found = [correlation(*alike(60, 12, correlated, rng)) for _ in range(50)]
        assert np.mean(found) == pytest.approx(correlated, abs=0.02)
    assert correlation(np.array([1.0, 1.0, 2.0, 2.0]), np.array([0, 0, 1, 1])) == 1
    assert correlation(np.array([1.0, 2.0, 1.0, 2.0]), np.array([0, 0, 1, 1])) == 0


def test_unequal_clusters_are_worth_fewer_where_their_windows_are_alike() -> None:
    rng = np.random.default_rng(2)
    sources = np.repeat(np.arange(30), [100] + [5] * 29)
    same = rng.normal(size=30)[sources]
    assert clustered(same, sources).freedom < 4  # the large one decides
    assert clustered(rng.normal(size=sources.size), sources).freedom > 4


def test_the_bound_over_documents_holds_where_that_over_windows_does_not() -> None:
    """Files as unequal as the standard library's, a correlation of 0.05: one-sided, 5 % allowed."""
    rng = np.random.default_rng(3)
    sizes = np.array([104, 58, 34, 32, 25, 24, 24, 18, 16, 14, 12, 11, 10, 9, 8, 7, 6, 6, 5, 4, 3, 3, 2, *[1] * 9])
    sources = np.repeat(np.arange(sizes.size), sizes)
    missed = np.zeros(2)
    for _ in range(600):
        differences = 0.05**0.5 * rng.normal(size=sizes.size)[sources] + 0.95**0.5 * rng.normal(size=sources.size)
        differences *= 0.04
        missed[0] += clustered_bounds(clustered(differences, sources), 0.05)[1] < 0
        missed[1] += bounds(increase_of(differences), 0.05)[1] < 0
    assert missed[0] / 600 < 0.07
    assert missed[1] / 600 > 0.12


def test_one_document_bounds_nothing() -> None:
    found = clustered(np.array([0.1, 0.2, 0.3]), np.zeros(3, dtype=np.int64))
    assert found == Clustered(pytest.approx(0.2), np.inf, 0.0, 1, 0.0)  # type: ignore[arg-type]
    assert clustered_bounds(found, 0.05) == (-100, np.inf)
