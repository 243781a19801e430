"""A map on the certify windows: looked at on random parts, stopped where it clearly fails, and never otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search.problem.judge import Judge
from search.run import certifying
from search.run.certifying import held
from ssm_mp.data import Windows
from ssm_mp.evaluation.compare import depart, expect
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from tests.tiny import MAMBA, random_model, some_windows

COUNT = 128


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each evaluation has; a window's likelihood is its first token, in thousandths."""
    counts: list[int] = []

    def evaluated(certifier: Judge, model: object, at: np.ndarray, what: str) -> Evaluation:
        counts.append(at.size)
        return Evaluation(certifier.windows.ids[:, 0].numpy()[at] / 1000, 1)

    monkeypatch.setattr(certifying, "_evaluated", evaluated)
    return counts


def judged(increases: np.ndarray) -> Judge:
    """Of windows on which the map's log-likelihood is higher by so much, in thousandths."""
    ids = torch.from_numpy(increases.astype(np.int64))[:, None].repeat(1, 2)
    return Judge(random_model(MAMBA), Windows(ids, np.arange(COUNT) // 4), "perplexity")


NONE = Evaluation(np.zeros(COUNT), 1)


def test_a_map_that_passes_sees_all_windows_once_and_all_count(seen: list[int]) -> None:
    increases = np.random.default_rng(0).integers(0, 60, COUNT)
    found = held(random_model(MAMBA), judged(increases), NONE, 5.0, 0, "x")
    assert seen == [32, 32, 64]
    assert (found.increase.windows, found.stopped) == (COUNT, False)
    assert found.increase.log_mean == pytest.approx(increases.mean() / 1000)
    assert found.clustered is not None
    assert found.clustered.clusters == 32
    assert found.clustered.log_mean == pytest.approx(increases.mean() / 1000)


def test_a_map_that_clearly_fails_is_stopped(seen: list[int]) -> None:
    found = held(random_model(MAMBA), judged(np.arange(COUNT) % 40 + 100), NONE, 5.0, 0, "x")
    assert seen == [32]
    assert found.stopped
    assert found.increase.windows == 32


def test_the_parts_are_random_ones(seen: list[int]) -> None:
    increases = np.where(np.arange(COUNT) < 32, 200, 0)  # the text's beginning alone is bad; the whole is at 5 %
    assert not held(random_model(MAMBA), judged(increases), NONE, 6.0, 0, "x").stopped
    assert sum(seen) == COUNT


def test_a_divergence_is_certified_in_nats_and_its_parts_find_their_reference() -> None:
    model, lowered, windows = random_model(MAMBA), random_model(MAMBA, seed=1), some_windows(COUNT)
    found = held(lowered, Judge(model, windows, "kl"), evaluate(model, windows), 1e6, 0, "x")
    whole = depart(lowered, windows, expect(model, windows))
    assert found.increase.log_mean == pytest.approx(whole.kl.mean() / windows.predicted)
    assert found.increase.log_mean > 0
