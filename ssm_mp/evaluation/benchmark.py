"""Bytes, memory and speed of a converted model, as ratios to the FP32 model measured in the same run.

Dimensions: `b` sequences, `l` tokens of a prompt, `n` tokens after it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssm_mp.artifact import tensor_bytes
from ssm_mp.data import Windows
from ssm_mp.decoding.decode import Decoding, open_decoder, prefill
from ssm_mp.model import LanguageModel

_DECODED = 32
"""Most tokens that are decoded in one measurement."""


@dataclass(frozen=True)
class Prefill:
    """Tokens per second of reading a prompt at one batch size, with logits for its last token, as before generating.

    Medians over interleaved pairs; `speedup` is the median of the ratios pair by pair, converted over FP32.
    """

    batch: int
    tokens_per_second: float
    fp32_tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class Decode:
    """Tokens per second of decoding one by one after a prompt, all sequences of a batch together.

    Both models read the same text, `steps` tokens after `prompt` ones. Medians and `speedup` as in `Prefill`.
    """

    batch: int
    prompt: int
    steps: int
    tokens_per_second: float
    fp32_tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class Benchmark:
    """What a converted model costs beside the FP32 model.

    `resident_bytes` are the tensors that the loaded model keeps in memory, each storage counted once.
    """

    stored_bytes: int
    file_bytes: int | None
    fp32_bytes: int
    resident_bytes: int
    fp32_resident_bytes: int
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]

    def to_json(self) -> dict[str, Any]:
        """Figures and their ratios to FP32 as plain JSON values."""
        return {
            "stored_bytes": self.stored_bytes,
            "file_bytes": self.file_bytes,
            "fp32_bytes": self.fp32_bytes,
            "compression": self.fp32_bytes / self.stored_bytes,
            "resident_bytes": self.resident_bytes,
            "fp32_resident_bytes": self.fp32_resident_bytes,
            "resident_ratio": self.resident_bytes / self.fp32_resident_bytes,
            "prefill": {
                str(p.batch): {
                    "tokens_per_second": round(p.tokens_per_second, 1),
                    "fp32_tokens_per_second": round(p.fp32_tokens_per_second, 1),
                    "speedup": round(p.speedup, 4),
                }
                for p in self.prefill
            },
            "decode": {
                str(d.batch): {
                    "prompt": d.prompt,
                    "steps": d.steps,
                    "tokens_per_second": round(d.tokens_per_second, 1),
                    "fp32_tokens_per_second": round(d.fp32_tokens_per_second, 1),
                    "speedup": round(d.speedup, 4),
                }
                for d in self.decode
            },
        }


def benchmark(
    model: LanguageModel,
    fp32: LanguageModel,
    windows: Windows,
    *,
    file_bytes: int | None = None,
    batches: Sequence[int] = (1, 32),
    decode_batches: Sequence[int] = (1,),
    pairs: int = 7,
) -> Benchmark:
    """Measure `model` beside `fp32` on the same windows, the two in turn; windows repeat where a batch needs more."""
    repeats = -(-max(*batches, *decode_batches) // len(windows))
    ids = windows.ids.repeat(repeats, 1)
    return Benchmark(
        stored_bytes=tensor_bytes(model),
        file_bytes=file_bytes,
        fp32_bytes=tensor_bytes(fp32),
        resident_bytes=resident_bytes(model),
        fp32_resident_bytes=resident_bytes(fp32),
        prefill=tuple(_prefill(model, fp32, ids[:batch], pairs) for batch in batches),
        decode=tuple(_decode(model, fp32, ids[:batch], pairs) for batch in decode_batches),
    )


def resident_bytes(model: LanguageModel) -> int:
    """Bytes of all storages behind a model's parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def prefill_seconds(models: Sequence[LanguageModel], ids: Tensor, rounds: int) -> list[list[float]]:
    """Seconds in which each model reads prompts `ids [b, l]`, logits of each last token included: `[models][rounds]`.

    The models run in turn, so that what else the machine does strikes them alike; a round to warm up is not counted.
    """
    return _in_turn([partial(_read, model, ids) for model in models], rounds)


def decode_seconds(models: Sequence[LanguageModel], ids: Tensor, prompt: int, rounds: int) -> list[list[float]]:
    """Seconds in which each model decodes the tokens of `ids [b, l]` after the first `prompt`: `[models][rounds]`.

    Reading the prompt and opening the decoder are not counted; the models run in turn, as in `prefill_seconds`.
    """
    read = [prefill(model, ids[:, :prompt]) for model in models]

    def decoded(model: LanguageModel, after: Decoding) -> float:
        tokens = ids[:, prompt:].to(model.device).unbind(dim=1)
        decoder = open_decoder(model, after)
        _synchronize(model)
        began = time.perf_counter()
        for column in tokens:
            decoder.step(column)
        _synchronize(model)
        return time.perf_counter() - began

    return _in_turn([partial(decoded, model, after) for model, after in zip(models, read, strict=True)], rounds)


def _prefill(model: LanguageModel, fp32: LanguageModel, ids: Tensor, pairs: int) -> Prefill:
    ours, theirs = prefill_seconds((model, fp32), ids, pairs)
    return Prefill(
        batch=ids.shape[0],
        tokens_per_second=ids.numel() / statistics.median(ours),
        fp32_tokens_per_second=ids.numel() / statistics.median(theirs),
        speedup=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    )


def _decode(model: LanguageModel, fp32: LanguageModel, ids: Tensor, pairs: int) -> Decode:
    """Half of each window is the prompt, and what follows it is decoded."""
    prompt = ids.shape[1] // 2
    steps = min(_DECODED, ids.shape[1] - prompt)
    ours, theirs = decode_seconds((model, fp32), ids[:, : prompt + steps], prompt, pairs)
    decoded = ids.shape[0] * steps
    return Decode(
        batch=ids.shape[0],
        prompt=prompt,
        steps=steps,
        tokens_per_second=decoded / statistics.median(ours),
        fp32_tokens_per_second=decoded / statistics.median(theirs),
        speedup=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    )


def _in_turn(timed: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each returns in each round but the first, one after another within a round."""
    with torch.inference_mode():
        found = [[once() for once in timed] for _ in range(rounds + 1)]
    return [list(seconds) for seconds in zip(*found[1:], strict=True)]


def _read(model: LanguageModel, ids: Tensor) -> float:
    ids = ids.to(model.device)
    _synchronize(model)
    began = time.perf_counter()
    model.head(model.hidden(ids)[:, -1:])
    _synchronize(model)
    return time.perf_counter() - began


def _synchronize(model: LanguageModel) -> None:
    """Wait for what a GPU still has to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
