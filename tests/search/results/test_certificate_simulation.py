"""How often a certificate is wrong, by simulated searches with known truth: at most 5 %, and not by luck."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.certificate import scenario, simulate
from search.results import certify as certificate
from search.results import ledger
from ssm_mp.evaluation.evaluate import Increase

SEARCHES = 1000
HARDEST = (
    "just above, 2 maps, 128 windows",
    "just above, 64 windows",
    "just above, 512 windows",
    "just above, skewness 2, 512 windows",
)
"""Maps that all truly break the budget by less than 1 % of it: whatever is certified is wrong."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HARDEST, "reference, 128 windows"])
def test_at_most_5_percent_of_searches_certify_a_map_that_breaks_the_budget(name: str) -> None:
    found = simulate(scenario(name), SEARCHES)
    assert found.studies == SEARCHES
    assert found.broken_percent <= 5
    if name.startswith("reference"):
        assert found.certified_percent > 50  # and it does certify
        assert found.uncertified_broken_percent is not None
        assert found.uncertified_broken_percent > 10  # where the smallest map of the front often breaks the budget


@pytest.mark.slow
def test_without_dividing_the_error_among_sequences_the_same_simulation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "error_share", lambda number, error: error)
    assert simulate(scenario(HARDEST[2]), 300).broken_percent > 8


@pytest.mark.slow
def test_without_the_bound_the_same_simulation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "bounds", lambda increase, error: (increase.percent, increase.percent))
    assert simulate(scenario(HARDEST[0]), 300).broken_percent > 20


@pytest.mark.slow
def test_without_the_skewness_a_long_tail_breaks_the_budget_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "just above, skewness 2, 64 windows"
    corrected = simulate(scenario(name), 500).broken
    real = certificate.bounds

    def blind(increase: Increase, error: float) -> tuple[float, float]:
        return real(replace(increase, skewness=0.0), error)

    monkeypatch.setattr(certificate, "bounds", blind)
    assert simulate(scenario(name), 500).broken > 1.5 * corrected
