from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.certify import Certificate, Try, bounds, certificate_from_json, certify, error_share
from search.confidence import reach
from search.gates import Facts, judge, overall
from ssm_mp.evaluate import Evaluation, Increase, paired_increase
from tests.search.test_front import point

FRONT = [point(i, 100 + i, 4.0 - i) for i in range(6)]


def held(log_means: list[float], stderr: float, budget: float = 5.0, windows: int = 100) -> Certificate:
    def measure(chosen: object) -> Increase:
        return Increase(log_means[FRONT.index(chosen)], stderr, windows)  # type: ignore[arg-type]

    found = certify(FRONT, measure, budget_percent=budget, confidence=0.95, windows_digest="x")
    assert found is not None
    return found


@given(st.integers(1, 60), st.floats(0.01, 0.2))
def test_all_shares_together_stay_within_the_error(tries: int, error: float) -> None:
    shares = [error_share(number + 1, error) for number in range(tries)]
    assert sum(shares) <= error
    assert shares == sorted(shares, reverse=True)


def increase_of(differences: np.ndarray) -> Increase:
    return paired_increase(Evaluation(differences * 9, 9), Evaluation(np.zeros(differences.size), 9))


def test_without_skewness_the_reach_is_that_of_the_one_sided_t_test() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.05, size=60)
    increase = increase_of(differences)
    bound = increase.log_mean + reach(0.95, 0.0, 60) * increase.log_stderr
    assert stats.ttest_1samp(differences, bound, alternative="less").pvalue == pytest.approx(0.05)


def test_the_bound_inverts_halls_transformation_at_a_skewness_of_two_standard_errors_more() -> None:
    increase = increase_of(np.random.default_rng(1).gamma(0.5, size=50))
    _, upper = bounds(increase, 0.95)
    t = (increase.log_mean - np.log1p(upper / 100)) / increase.log_stderr
    root, skewness = np.sqrt(50), increase.skewness + 2 * np.sqrt(6 / 50)
    transformed = t + skewness * t**2 / (3 * root) + skewness**2 * t**3 / (27 * 50) + skewness / (6 * root)
    assert transformed == pytest.approx(stats.t.ppf(0.05, 49))


@given(st.floats(-8, 8), st.integers(3, 2000), st.floats(0.6, 0.9999))
def test_skewness_only_widens_the_bounds_and_mirrors(skewness: float, windows: int, confidence: float) -> None:
    plain = tuple(100 * np.expm1(sign * 0.001 * reach(confidence, 0.0, windows)) for sign in (-1, 1))
    skewed = bounds(Increase(0.0, 0.001, windows, skewness), confidence)
    mirrored = bounds(Increase(0.0, 0.001, windows, -skewness), confidence)
    assert skewed[0] <= plain[0] < plain[1] <= skewed[1]
    assert np.log1p(skewed[1] / 100) == pytest.approx(-np.log1p(mirrored[0] / 100))


def test_the_skewness_of_differences_is_scipys() -> None:
    differences = np.random.default_rng(2).gamma(1.0, size=40)
    assert increase_of(differences).skewness == pytest.approx(stats.skew(differences, bias=False))
    assert increase_of(np.array([1.0, 2.0])).skewness == increase_of(np.ones(9)).skewness == 0


def test_the_smallest_that_holds_is_certified() -> None:
    found = held([0.08, 0.06, 0.01, 0.0, 0.0, 0.0], 0.001)
    assert (found.verdict, found.winner) == ("certified", 2)
    assert [tried.verdict for tried in found.tries] == ["not certified", "not certified", "certified"]
    assert found.tries[1].confidence > found.tries[0].confidence > 0.95
    assert found.upper_percent < 5


def test_the_whole_front_is_tried() -> None:
    found = held([0.2, 0.2, 0.2, 0.2, 0.2, 0.01], 0.001)
    assert (found.verdict, found.winner) == ("certified", 5)


def test_a_try_is_not_repeated_and_others_must_reach_more() -> None:
    first = held([0.08, 0.01, 0.0, 0.0, 0.0, 0.0], 0.001)

    def never(chosen: object) -> Increase:
        raise AssertionError(f"{chosen} was tried before")

    again = certify(FRONT, never, budget_percent=5, confidence=0.95, windows_digest="x", former=first.tries)
    assert again == first
    surer = certify(
        FRONT, lambda _: Increase(0.0, 0.001, 100), budget_percent=5, confidence=0.999, windows_digest="x",
        former=first.tries,
    )  # fmt: skip
    assert surer is not None
    assert surer.tries[0].confidence == pytest.approx(1 - 0.001 / 8)
    more = certify(
        FRONT,
        lambda _: Increase(0.0, 0.001, 200),
        budget_percent=5,
        confidence=0.95,
        windows_digest="y",
        former=first.tries,
    )
    assert more is not None
    assert more.tries[0].confidence == pytest.approx(1 - 0.05 / 8)


def test_too_few_windows_are_inconclusive() -> None:
    found = held([0.04] * 6, 0.05)
    assert (found.verdict, found.winner) == ("inconclusive", None)


def test_maps_that_all_break_the_budget_are_not_certified() -> None:
    found = held([0.2] * 6, 0.001)
    assert (found.verdict, found.winner) == ("not certified", None)


def test_an_empty_front_has_no_certificate() -> None:
    assert certify([], lambda _: Increase(0, 0, 2), budget_percent=5, confidence=0.95, windows_digest="") is None


def test_a_certificate_survives_json() -> None:
    found = held([0.08, 0.01, 0.0, 0.0, 0.0, 0.0], 0.001)
    values = found.to_json()
    assert certificate_from_json(values) == found


@pytest.mark.parametrize("tries", [1, 4])
def test_maps_on_the_edge_of_the_budget_are_rarely_certified(tries: int) -> None:
    """All candidates truly at the budget: certifying any is an error, allowed in at most 5 % of searches.

    Each search looks twice, the second time on as many windows again, as the report advises.
    """
    rng = np.random.default_rng(tries)
    edge, wrong, searches = np.log1p(0.05), 0, 1000
    for _ in range(searches):
        draws = rng.normal(edge, 0.1, size=(tries, 100))
        former: tuple[Try, ...] = ()
        for windows in (50, 100):

            def measure(chosen: object, draws: np.ndarray = draws[:, :windows]) -> Increase:
                differences = draws[FRONT.index(chosen)]  # type: ignore[arg-type]
                return paired_increase(Evaluation(differences, 1), Evaluation(np.zeros(differences.size), 1))

            found = certify(
                FRONT[:tries], measure, budget_percent=5, confidence=0.95, windows_digest=str(windows), former=former
            )
            assert found is not None
            former += found.tries
            if found.verdict == "certified":
                wrong += 1
                break
    # three standard deviations of a binomial above 5 %
    assert wrong <= 50 + 3 * np.sqrt(1000 * 0.05 * 0.95)
    assert wrong > 0


GOOD = Facts(compression=3.0, speedup=1.5, float32_arrays=0)


@pytest.mark.parametrize(
    ("log_mean", "facts", "expected"),
    [
        (0.01, GOOD, "pass"),
        (0.01, Facts(1.4, 1.5, 0), "warn"),
        (0.01, Facts(3.0, 1.1, 0), "warn"),
        (0.01, Facts(1.2, 1.5, 0), "fail"),
        (0.01, Facts(3.0, 1.5, 1), "fail"),
        (0.07, None, "warn"),
        (0.2, None, "fail"),
    ],
)
def test_gates_pass_warn_and_fail_by_their_figures(log_mean: float, facts: Facts | None, expected: str) -> None:
    assert overall(judge(held([log_mean] * 6, 0.0001), facts)) == expected


def test_an_artifact_that_does_not_load_fails() -> None:
    assert overall(judge(held([0.01] * 6, 0.0001), None, "what was read back is not what was measured")) == "fail"


def test_nothing_within_the_budget_fails() -> None:
    assert overall(judge(None, None)) == "fail"
