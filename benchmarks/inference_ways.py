"""Reading and decoding by several ways in turn, and what follows from their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from benchmarks.stacking import seconds as seconds_on
from ssm_mp.decoding.decode import open_decoder, prefill
from ssm_mp.model import LanguageModel

FP32, TORCHAO, LLAMA_CPP = "fp32", "torchao", "llama.cpp"
RIVALS = {
    "fp16": "llama.cpp-fp16", "int8-static": "llama.cpp-int8", "int8-dynamic": TORCHAO, "winner": "llama.cpp-winner",
    "nf4": "llama.cpp-int4", "int4": "llama.cpp-int4",
}  # fmt: skip
"""What each of our ways is held against; llama.cpp has no nf4, and its way of the same size stands in."""

Once = Callable[[], float]
"""Does something once; seconds."""
Ways = tuple[dict[str, Once], dict[str, Once]]
"""Of reading and of decoding, by name."""


def prefill_ways(models: Mapping[str, LanguageModel], ids: Tensor) -> dict[str, Once]:
    """Reading `ids [b, l]` by each of our models."""

    def way(model: LanguageModel) -> Once:
        return lambda: seconds_on(lambda: prefill(model, ids), model.device)

    return {name: way(model) for name, model in models.items()}


def decode_ways(models: Mapping[str, LanguageModel], ids: Tensor, steps: int) -> dict[str, Once]:
    """Decoding `steps` tokens by each of our models, after the first three quarters of `ids [b, l]`."""
    prompt = 3 * ids.shape[1] // 4
    tokens = ids[:, prompt : prompt + steps].unbind(dim=1)

    def way(model: LanguageModel) -> Once:
        read = prefill(model, ids[:, :prompt])

        def once() -> float:
            decoder = open_decoder(model, read)
            return seconds_on(lambda: [decoder.step(token) for token in tokens], model.device)

        return once

    return {name: way(model) for name, model in models.items()}


def in_turn(ways: Mapping[str, Once], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; a round to warm up is not counted."""
    found = [{name: once() for name, once in ways.items()} for _ in range(rounds + 1)]
    return {name: [seconds[name] for seconds in found[1:]] for name in ways}


def summarise(seconds: Mapping[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Of each way: tokens a second and speedup over FP32; torchao's is its faster one."""
    found = {
        name: {
            "tokens_per_second": tokens / statistics.median(spent),
            "speedup": _times_as_fast(seconds[FP32], spent),
        }
        for name, spent in seconds.items()
    }
    compiled = [name for name in found if name.startswith(TORCHAO)]
    if compiled:
        found["torchao-default"] = found[TORCHAO]
        found[TORCHAO] = max((found[name] for name in compiled), key=lambda row: row["speedup"])
    return found


def over_rivals(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each of our ways with a rival in the same rounds: how many times as fast as it, the faster where there are
    several of a name."""
    found: dict[str, dict[str, float]] = {}
    for ours, rival in RIVALS.items():
        theirs = [spent for name, spent in seconds.items() if name.startswith(rival)]
        if ours in seconds and theirs:
            found[ours] = {rival: min(_times_as_fast(spent, seconds[ours]) for spent in theirs)}
    return found


def _times_as_fast(slow: Iterable[float], fast: Iterable[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
