from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from search.base.confidence import reach
from search.base.front import Point
from search.cli.answers import fronted
from search.results.certify import Certificate, Held, bounds, certificate_from_json, certify
from search.results.gates import Facts, judge, overall
from search.results.ledger import Entry, error_share
from search.results.outlook import outlook
from search.results.report import front_json
from search.run.finish import describe
from ssm_mp.evaluation.evaluate import Evaluation, Increase, paired_increase
from tests.search.base.test_front import point

FRONT = [point(i, 100 + i, 4.0 - i) for i in range(6)]


SAFEST_FIRST = FRONT[::-1]


def held(log_means: list[float], stderr: float, budget: float = 5.0, windows: int = 100) -> Certificate:
    def measure(chosen: Point) -> Held:
        return Held(Increase(log_means[FRONT.index(chosen)], stderr, windows))

    found = certify(FRONT, measure, plans=[SAFEST_FIRST], budget_percent=budget, confidence=0.95, windows_digest="x")
    assert found is not None
    return found


def increase_of(differences: np.ndarray) -> Increase:
    return paired_increase(Evaluation(differences * 9, 9), Evaluation(np.zeros(differences.size), 9))


def test_without_skewness_the_reach_is_that_of_the_one_sided_t_test() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.05, size=60)
    increase = increase_of(differences)
    bound = increase.log_mean + reach(0.05, 0.0, 60) * increase.log_stderr
    assert stats.ttest_1samp(differences, bound, alternative="less").pvalue == pytest.approx(0.05)


def test_the_bound_inverts_halls_transformation_at_a_skewness_of_two_standard_errors_more() -> None:
    increase = increase_of(np.random.default_rng(1).gamma(0.5, size=50))
    _, upper = bounds(increase, 0.05)
    t = (increase.log_mean - np.log1p(upper / 100)) / increase.log_stderr
    root, skewness = np.sqrt(50), increase.skewness + 2 * np.sqrt(6 / 50)
    transformed = t + skewness * t**2 / (3 * root) + skewness**2 * t**3 / (27 * 50) + skewness / (6 * root)
    assert transformed == pytest.approx(stats.t.ppf(0.05, 49))


@given(st.floats(-8, 8), st.integers(3, 2000), st.floats(0.0001, 0.4))
def test_skewness_only_widens_the_bounds_and_mirrors(skewness: float, windows: int, error: float) -> None:
    plain = tuple(100 * np.expm1(sign * 0.001 * reach(error, 0.0, windows)) for sign in (-1, 1))
    skewed = bounds(Increase(0.0, 0.001, windows, skewness), error)
    mirrored = bounds(Increase(0.0, 0.001, windows, -skewness), error)
    assert skewed[0] <= plain[0] < plain[1] <= skewed[1]
    assert np.log1p(skewed[1] / 100) == pytest.approx(-np.log1p(mirrored[0] / 100))


@st.composite
def finite_differences(draw: st.DrawFn) -> np.ndarray:
    """Of any magnitude that likelihoods from float32 logits can have, all alike or far apart."""
    magnitude = draw(st.sampled_from([1e-40, 1e-16, 1e-3, 1.0, 50.0, 800.0, 1e5, 1e38]))
    size = draw(st.integers(2, 40))
    return magnitude * np.array(draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)))


@settings(max_examples=300)
@given(finite_differences(), st.floats(0.5, 1, exclude_min=True, exclude_max=True))
@example(np.array([0.0, 400.0]), 0.999)
@example(np.array([0.0, 0.4]), 0.9999999999999999)
@example(np.array([9e3, 9e3]), 0.95)
@example(np.array([9e3, 9e4]), 0.95)
def test_bounds_enclose_the_mean_whatever_the_differences(differences: np.ndarray, confidence: float) -> None:
    increase = increase_of(differences)
    lower, upper = bounds(increase, 1 - confidence)
    assert -100 <= lower <= increase.percent <= upper  # and none of them is NaN
    assert increase.stderr_percent >= 0


@pytest.mark.parametrize("error", [1e-17, 1e-100, 1e-300, 0.0])
@pytest.mark.parametrize("windows", [2, 3, 50, 512, 2048])
def test_the_reach_grows_on_where_one_minus_the_error_is_one(error: float, windows: int) -> None:
    assert reach(1e-16, 0.5, windows) < reach(error, 0.5, windows) or reach(error, 0.5, windows) == np.inf
    if error and windows > 3:
        assert reach(error, 0.0, windows) == pytest.approx(stats.t.isf(error, windows - 1), rel=1e-6)


def test_the_skewness_of_differences_is_scipys() -> None:
    differences = np.random.default_rng(2).gamma(1.0, size=40)
    assert increase_of(differences).skewness == pytest.approx(stats.skew(differences, bias=False))
    assert increase_of(np.array([1.0, 2.0])).skewness == increase_of(np.ones(9)).skewness == 0


def test_the_last_before_the_first_that_fails_is_certified() -> None:
    found = held([0.0, 0.08, 0.01, 0.0, 0.0, 0.0], 0.001)
    assert (found.verdict, found.winner) == ("certified", 2)  # trial 0 would have passed, but 1 stands before it
    assert [(tried.trial, tried.verdict) for tried in found.tries] == [
        (1, "not certified"), (2, "certified"), (3, "certified"), (4, "certified"), (5, "certified"),
    ]  # fmt: skip
    assert found.upper_percent < 5
    assert found.planned == (5, 4, 3, 2, 1, 0)


def test_all_maps_of_a_sequence_are_tested_at_one_share_of_the_error() -> None:
    found = held([0.0] * 6, 0.001)
    assert (found.verdict, found.winner) == ("certified", 0)
    assert [tried.error for tried in found.tries] == [error_share(1, 1 - 0.95)] * 6


def test_too_few_windows_are_inconclusive() -> None:
    found = held([0.04] * 6, 0.05)
    assert (found.verdict, found.winner) == ("inconclusive", None)


def test_maps_that_all_break_the_budget_are_not_certified() -> None:
    found = held([0.2] * 6, 0.001)
    assert (found.verdict, found.winner) == ("not certified", None)


def test_an_empty_front_has_no_certificate() -> None:
    asked = {"plans": [], "budget_percent": 5, "confidence": 0.95, "windows_digest": ""}
    assert certify([], lambda _: Held(Increase(0, 0, 2)), **asked) is None  # type: ignore[arg-type]


def test_a_certificate_survives_json() -> None:
    found = held([0.08, 0.01, 0.0, 0.0, 0.0, 0.0], 0.001)
    values = found.to_json()
    assert certificate_from_json(json.loads(json.dumps(values, allow_nan=False))) == found


def two_windows(log_means: list[float], spread: float) -> Certificate:
    found = certify(
        FRONT,
        lambda chosen: Held(Increase(log_means[FRONT.index(chosen)], spread, 2)),
        plans=[[point] for point in FRONT],
        budget_percent=5,
        confidence=0.95,
        windows_digest="x",
    )
    assert found is not None
    return found


def test_two_windows_far_apart_are_inconclusive_with_an_infinite_bound() -> None:
    found = two_windows([0.01] * 6, 100.0)
    assert (found.verdict, found.upper_percent) == ("inconclusive", np.inf)
    assert [tried.lower_percent for tried in found.tries] == [-100.0] * 6


def test_an_infinite_bound_is_null_in_json_and_is_read_back() -> None:
    found = two_windows([0.01, 800.0, 800.0, 0, 0, 0], 100.0)
    written = json.dumps(found.to_json(), allow_nan=False)  # JSON knows no infinity
    assert json.loads(written)["upper_percent"] is None
    assert json.loads(written)["tries"][1]["increase_percent"] is None
    assert certificate_from_json(json.loads(written)) == found
    assert certificate_from_json({**json.loads(written), "upper_percent": np.inf}) == found  # as version 0.4 wrote it


def test_an_infinite_bound_is_shown_as_such() -> None:
    found = two_windows([0.01] * 6, 100.0)
    answer = front_json(FRONT, [], {"perplexity": 9.0, "bytes": 9}, 5.0, found.to_json(), None, outlook(found))
    assert "at most +inf %" in fronted(json.loads(json.dumps(answer, allow_nan=False)))
    assert "upper bound +inf %" in judge(found, None)[0].figures
    assert "at most +inf %" in describe(found, any_within=True)
    assert "raise `[data] certify_windows` and run" in outlook(found)[1]


@pytest.mark.parametrize("maps", [1, 4])
def test_maps_on_the_edge_of_the_budget_are_rarely_certified(maps: int) -> None:
    """All candidates truly at the budget: certifying any is an error, allowed in at most 5 % of searches.

    Each search looks twice, the second time on as many windows again, as the report advises.
    """
    rng = np.random.default_rng(maps)
    edge, wrong, searches = np.log1p(0.05), 0, 1000
    for _ in range(searches):
        draws = rng.normal(edge, 0.1, size=(maps, 100))
        ledger: list[Entry] = []
        for windows in (50, 100):

            def measure(chosen: Point, draws: np.ndarray = draws[:, :windows]) -> Held:
                return Held(increase_of(draws[FRONT.index(chosen)]))

            found = certify(
                FRONT[:maps], measure, plans=[FRONT[:maps][::-1]], budget_percent=5, confidence=0.95,
                windows_digest=str(windows), former=tuple(ledger), note=ledger.append,
            )  # fmt: skip
            assert found is not None
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
