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
