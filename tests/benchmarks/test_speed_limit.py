"""The limit does all of the work that it stands for, and no more."""

from __future__ import annotations

import torch

from benchmarks import speed_limit
from benchmarks.speed_limit import SpeedLimit, Work
from ssm_mp.components import find_components
from tests.tiny import HUGGING_FACE, random_model, some_windows


def test_every_thread_runs_its_share() -> None:
    runs = [0, 0]

    def counting(thread: int) -> speed_limit.Run:
        def run() -> None:
            runs[thread] += 1

        return run

    speed_limit._seconds([Work((counting(0), counting(1)), 10, 200), Work((counting(0), counting(1)), 50, 200)])
    assert runs == [10 + 2, 10 + 2]


def test_products_are_those_of_the_map_on_the_tokens_of_the_windows() -> None:
    windows = some_windows(64)
    limit = SpeedLimit(HUGGING_FACE, find_components(random_model(HUGGING_FACE)), windows)
    c, tokens, predicted = HUGGING_FACE, windows.ids.numel(), len(windows) * windows.predicted
    assert limit._shapes["embedding"] == (c.vocabulary, c.d_model, predicted)
    assert limit._shapes["layers.1.ssm.in_proj"] == (2 * c.d_inner, c.d_model, tokens)
    assert len(limit._shapes) == 1 + 4 * c.n_layers
    every = tokens * c.n_layers * c.d_inner * (c.d_state + 3) + predicted * c.vocabulary
    assert limit._exponentials.total == every
    assert limit._logits.total == predicted
    for dtype, precision in ((torch.float32, "fp16"), (torch.int8, "int8")):
        assert all((shape, dtype) in limit._products for shape in limit._shapes.values())
        found = limit.measure(dict.fromkeys(limit._shapes, precision))
        assert found.seconds == found.products + found.exponentials + found.logits
        assert min(found.products, found.exponentials, found.logits) > 0
