"""Racing: bounds, reasons, and by simulation how often a map of the front is stopped."""

from __future__ import annotations

import numpy as np
import pytest

from search.measure.racing import best_rival, judge, lower_bound, next_rung, rungs


def test_rungs_double_and_end_with_all_windows() -> None:
    assert rungs(128) == (16, 32, 64, 128)
    assert rungs(100) == (16, 32, 64, 100)
    assert rungs(8) == (8,)


def test_the_bound_tightens_to_the_mean_once_all_windows_are_seen() -> None:
    differences = np.random.default_rng(0).normal(0.05, 0.02, 64)
    assert lower_bound(differences, 64, 0.01) == pytest.approx(differences.mean())
    assert lower_bound(differences[:16], 64, 0.01) < lower_bound(differences[:16], 17, 0.01)


def test_a_hopeless_map_is_stopped_at_once_and_a_close_one_is_not() -> None:
    rng = np.random.default_rng(0)
    stop = judge(rng.normal(0.3, 0.05, 16), 128, 5.0, None, 0.01)
    assert stop is not None
    assert stop.reason == "over budget"
    assert stop.lower_percent > 5
    assert judge(rng.normal(0.05, 0.05, 16), 128, 5.0, None, 0.01) is None


def test_pairing_with_the_rival_sees_what_the_mean_alone_cannot() -> None:
    rng = np.random.default_rng(0)
    rival = rng.normal(0.02, 0.03, 128)
    worse = rival[:32] + rng.normal(0.004, 0.001, 32)
    stop = judge(worse, 128, 5.0, rival[:32], 0.01)
    assert stop is not None
    assert stop.reason == "dominated"
    assert judge(worse, 128, 5.0, None, 0.01) is None
    assert judge(rival[:32] - 0.001, 128, 5.0, rival[:32], 0.01) is None


def test_a_map_that_shows_no_sign_of_being_stopped_is_looked_at_no_more() -> None:
    alternating = np.tile([-1.0, 1.0], 8)
    near, far = 0.01 + 0.03 * alternating, 0.052 + 0.02 * alternating
    assert judge(far, 128, 5.0, None, 0.01) is None
    assert next_rung(near, 128, 5.0, None, 0.01) == 128
    assert next_rung(far, 128, 5.0, None, 0.01) == 64
    assert next_rung(near, 128, 5.0, near - 0.01 - 0.01 * alternating, 0.01) == 32
    assert next_rung(far, 20, 5.0, None, 0.01) == 20


def test_few_maps_that_every_look_would_stop_are_missed_by_leaving_looks_out() -> None:
    rng = np.random.default_rng(3)
    every = left_out = looks = 0
    for _ in range(400):
        row = rng.normal(rng.uniform(0.03, 0.12), 0.06, 128)
        every += raced(row, 5.0, None, 0.05)
        n = 16
        while n < 128:
            looks += 1
            if judge(row[:n], 128, 5.0, None, 0.05) is not None:
                left_out += 1
                break
            n = next_rung(row[:n], 128, 5.0, None, 0.05)
    assert every > 100
    assert left_out >= 0.9 * every
    assert looks < 2 * 400


def test_the_rival_is_the_best_map_that_is_no_larger() -> None:
    finished = [(100, np.full(4, 0.03)), (90, np.full(4, 0.02)), (120, np.full(4, 0.01))]
    rival = best_rival(110, finished)
    assert rival is not None
    assert rival[0] == 0.02
    assert best_rival(80, finished) is None


def raced(differences: np.ndarray, budget: float, rival: np.ndarray | None, error: float) -> bool:
    """Whether some rung stops a map, given its differences on all windows."""
    seen = rungs(differences.size)[:-1]
    held = differences if rival is None else rival
    return any(
        judge(differences[:n], differences.size, budget, None if rival is None else held[:n], error) is not None
        for n in seen
    )


def draws(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Window noise of mean zero and unit variance; the skewed one is that of an exponential, either way round."""
    if kind == "normal":
        return rng.normal(size=size)
    noise = rng.exponential(size=size) - 1
    return noise if kind == "long tail above" else -noise


@pytest.mark.parametrize("kind", ["normal", "long tail above", "long tail below"])
@pytest.mark.parametrize("against", ["budget", "rival"])
def test_maps_that_belong_on_the_front_are_stopped_no_more_often_than_allowed(kind: str, against: str) -> None:
    # the hardest case: a map that all windows would show exactly at the budget, or exactly as good as its rival
    rng = np.random.default_rng(7)
    error, maps, windows = 0.05, 3000, 128
    noise = 0.04 * draws(kind, rng, (maps, windows))
    noise -= noise.mean(axis=1, keepdims=True)
    budget = 5.0
    wrong = 0
    for row in noise:
        if against == "budget":
            wrong += raced(np.log1p(budget / 100) + row, budget, None, error)
        else:
            rival = rng.normal(0.01, 0.03, windows)
            wrong += raced(rival + row, 1e9, rival, error)
    assert wrong / maps <= error
    assert raced(np.full(windows, 0.2) + noise[0], budget, None, error)  # and it does stop what is hopeless


def test_without_dividing_the_error_among_looks_the_same_simulation_fails() -> None:
    rng = np.random.default_rng(7)
    error, maps, windows = 0.05, 3000, 128
    noise = 0.04 * rng.normal(size=(maps, windows))
    noise -= noise.mean(axis=1, keepdims=True)
    wrong = sum(any(lower_bound(row[:n], windows, error) > 0 for n in rungs(windows)[:-1]) for row in noise)
    assert wrong / maps > error
