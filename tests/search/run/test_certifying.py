"""A map on the certify windows: looked at on random parts, stopped where it clearly fails, and never otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search.run import certifying
from search.run.certifying import held
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import Evaluation
from tests.tiny import MAMBA, random_model

COUNT = 128


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each evaluation has; a window's likelihood is its first token, in thousandths."""
    counts: list[int] = []

    def evaluated(model: object, windows: Windows, what: str) -> Evaluation:
        counts.append(len(windows))
        return Evaluation(windows.ids[:, 0].numpy() / 1000, 1)

    monkeypatch.setattr(certifying, "_evaluated", evaluated)
    return counts


def windows_of(increases: np.ndarray) -> Windows:
    """Windows on which the map's log-likelihood is higher by so much, in thousandths."""
    return Windows(torch.from_numpy(increases.astype(np.int64))[:, None].repeat(1, 2), np.arange(COUNT) // 4)


NONE = Evaluation(np.zeros(COUNT), 1)


def test_a_map_that_passes_sees_all_windows_once_and_all_count(seen: list[int]) -> None:
    increases = np.random.default_rng(0).integers(0, 60, COUNT)
    found = held(random_model(MAMBA), windows_of(increases), NONE, 5.0, 0, "x")
    assert seen == [32, 32, 64]
    assert (found.increase.windows, found.stopped) == (COUNT, False)
    assert found.increase.log_mean == pytest.approx(increases.mean() / 1000)
    assert found.clustered is not None
    assert found.clustered.clusters == 32
    assert found.clustered.log_mean == pytest.approx(increases.mean() / 1000)


def test_a_map_that_clearly_fails_is_stopped(seen: list[int]) -> None:
    found = held(random_model(MAMBA), windows_of(np.arange(COUNT) % 40 + 100), NONE, 5.0, 0, "x")
    assert seen == [32]
    assert found.stopped
    assert found.increase.windows == 32


def test_the_parts_are_random_ones(seen: list[int]) -> None:
    increases = np.where(np.arange(COUNT) < 32, 200, 0)  # the text's beginning alone is bad; the whole is at 5 %
    assert not held(random_model(MAMBA), windows_of(increases), NONE, 6.0, 0, "x").stopped
    assert sum(seen) == COUNT
