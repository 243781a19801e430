"""What a benchmark measures of decoding: both models, the same tokens, in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_mp import benchmark as measure
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.decoding.decode import PlainDecoder
from ssm_mp.evaluation.benchmark import decode_seconds, prefill_seconds
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, LENGTH, MAMBA, random_model, some_windows


@pytest.mark.parametrize("family", CONFIGS)
def test_decoding_is_measured_beside_fp32_and_told_in_json(family: str) -> None:
    model = random_model(CONFIGS[family])
    half = convert(model, PrecisionMap.uniform("fp16", find_components(model)), Scheme("none"))
    found = measure(half, model, some_windows(2), batches=(1,), decode_batches=(1, 4), pairs=1)
    assert [(d.batch, d.prompt, d.steps) for d in found.decode] == [(1, LENGTH // 2, LENGTH // 2), (4, 8, 8)]
    # one pair: the ratio of the two rates is the speedup
    assert found.decode[0].speedup == pytest.approx(
        found.decode[0].tokens_per_second / found.decode[0].fp32_tokens_per_second
    )
    told = found.to_json()["decode"]
    assert told.keys() == {"1", "4"}
    assert told["4"].keys() == {"prompt", "steps", "tokens_per_second", "fp32_tokens_per_second", "speedup", "pairs"}


def test_models_decode_the_tokens_after_the_prompt_in_turn_and_warm_up_uncounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = random_model(MAMBA, 0), random_model(MAMBA, 1)
    stepped: list[tuple[LanguageModel, list[int]]] = []

    class Watched(PlainDecoder):
        def step(self, tokens: Tensor) -> Tensor:
            stepped.append((self._model, tokens.tolist()))
            return super().step(tokens)

    monkeypatch.setattr("ssm_mp.evaluation.benchmark.open_decoder", Watched)
    ids = torch.arange(2 * 6).reshape(2, 6)
    found = decode_seconds((first, second), ids, 4, rounds=2)
    assert [len(seconds) for seconds in found] == [2, 2]
    assert min(map(min, found)) > 0
    after = [[4, 10], [5, 11]]
    assert stepped == [(model, tokens) for _ in range(3) for model in (first, second) for tokens in after]


def test_prompts_are_timed_for_each_model_and_round() -> None:
    model = random_model(MAMBA)
    found = prefill_seconds((model, model, model), some_windows(2).ids, rounds=2)
    assert [len(seconds) for seconds in found] == [2, 2, 2]
    assert min(map(min, found)) > 0


def test_smaller_batches_come_first_and_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, now = random_model(MAMBA), [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now[0]

    def read(_: LanguageModel, ids: Tensor) -> float:
        now[0] += ids.numel() / LENGTH  # a second a window
        return ids.numel() / LENGTH

    monkeypatch.setattr("ssm_mp.evaluation.benchmark.time", Clock)
    monkeypatch.setattr("ssm_mp.evaluation.benchmark._read", read)
    windows, shares = some_windows(8), list[float]()
    found = measure(model, model, windows, decode_batches=(), batches=(8, 1), seconds=42, progress=shares.append)
    # a pair of batch 1 takes 2 s, of batch 8 takes 16 s: one of each, then what fits
    assert [(p.batch, p.pairs) for p in found.prefill] == [(1, 3), (8, 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    short = measure(model, model, windows, decode_batches=(), batches=(8, 1), seconds=12)
    assert [(p.batch, p.pairs) for p in short.prefill] == [(1, 3)]
    assert short.left_out == ("prefill of 8 not measured: it would have taken about 16 s, 10 s were left",)
    assert short.to_json()["left_out"] == list(short.left_out)
    whole = measure(model, model, windows, decode_batches=(), batches=(8, 1))
    assert [(p.batch, p.pairs) for p in whole.prefill] == [(1, 7), (8, 7)]
