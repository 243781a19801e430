"""Bytes, memory and speed of a converted model, as ratios to the FP32 model measured in the same run.

Dimensions: `b` sequences, `l` tokens of a prompt, `n` tokens after it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

Progress = Callable[[float], None]
"""Told the share of the timing that is done."""


@dataclass(frozen=True)
class Prefill:
    """Tokens per second of reading a prompt at one batch size, with logits for its last token, as before generating.

    Medians over interleaved `pairs`; `speedup` is the median of the ratios pair by pair, converted over FP32. The only
    pair is the first, which otherwise warms up and is not counted.
    """

    batch: int
    tokens_per_second: float
    fp32_tokens_per_second: float
    speedup: float
    pairs: int


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
    pairs: int


@dataclass(frozen=True)
class Benchmark:
    """What a converted model costs beside the FP32 model.

    `resident_bytes` are the tensors that the loaded model keeps in memory, each storage counted once. left_out: what
    was not timed, and why, a sentence each; timed_seconds: what timing took.
    """

    stored_bytes: int
    file_bytes: int | None
    fp32_bytes: int
    resident_bytes: int
    fp32_resident_bytes: int
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    left_out: tuple[str, ...] = ()
    timed_seconds: float = 0.0

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
                    "pairs": p.pairs,
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
                    "pairs": d.pairs,
                }
                for d in self.decode
            },
            "timed_seconds": round(self.timed_seconds, 3),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
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
    seconds: float = math.inf,
    progress: Progress = lambda share: None,
) -> Benchmark:
    """Measure `model` beside `fp32` on the same windows, the two in turn; windows repeat where a batch needs more.

    seconds: what timing may take; within it the smaller batches come first, one pair of each before there are more,
    up to `pairs`, an odd number. What does not fit is left out.
    """
    repeats = -(-max(*batches, *decode_batches) // len(windows))
    ids = windows.ids.repeat(repeats, 1)
    began = time.perf_counter()
    cost = _cost((model, fp32), ids[:1]) if seconds < math.inf else _Cost(0.0, 0.0)
    tasks = [_reading(model, fp32, ids[:batch], cost) for batch in sorted(batches)]
    tasks += [_decoding(model, fp32, ids[:batch], cost) for batch in sorted(decode_batches)]
    ends = began + seconds
    left_out = _time_all(sorted(tasks, key=lambda task: task.batch), pairs, ends, progress)
    return Benchmark(
        stored_bytes=tensor_bytes(model),
        file_bytes=file_bytes,
        fp32_bytes=tensor_bytes(fp32),
        resident_bytes=resident_bytes(model),
        fp32_resident_bytes=resident_bytes(fp32),
        prefill=tuple(_prefill(task) for task in tasks if task.found and task.prompt is None),
        decode=tuple(_decode(task) for task in tasks if task.found and task.prompt is not None),
        left_out=tuple(left_out),
        timed_seconds=time.perf_counter() - began,
    )


def untimed(model: LanguageModel, fp32: int, reason: str) -> Benchmark:
    """Sizes of a model beside FP32 of `fp32` bytes, of which nothing is timed, for a reason."""
    return Benchmark(tensor_bytes(model), None, fp32, resident_bytes(model), fp32, (), (), (reason,))


@dataclass(frozen=True)
class _Cost:
    """About how many seconds both models together take: for anything, and for each further token read."""

    call: float
    token: float

    def of(self, tokens: int, calls: int = 1) -> float:
        return calls * self.call + tokens * self.token


def _cost(models: Sequence[LanguageModel], ids: Tensor) -> _Cost:
    """From a part of one window `ids [1, l]`."""
    part = ids[:, : max(2, ids.shape[1] // 8)]
    with torch.inference_mode():
        for model in models:  # the first call makes what the next ones find
            _read(model, part[:, :1])
        one, many = (sum(_read(model, some) for model in models) for some in (part[:, :1], part))
    return _Cost(one, max(0.0, many - one) / (part.shape[1] - 1))


@dataclass(eq=False)
class _Task:
    """One figure to time: `pair` times ours, then FP32's; `about`: what a pair may take, before there was one.

    prompt: tokens before the first one that is decoded, None where the whole is a prompt. Times in seconds; `found`
    grows with each counted pair, `whole` is what the latest took with all that is not counted.
    """

    what: str
    batch: int
    tokens: int
    pair: Callable[[], tuple[float, float]]
    about: float
    prompt: int | None = None
    whole: float = 0.0
    found: list[tuple[float, float]] = field(default_factory=list)

    def once(self) -> tuple[float, float]:
        """One pair, not counted yet."""
        began = time.perf_counter()
        with torch.inference_mode():
            pair = self.pair()
        self.whole = time.perf_counter() - began
        return pair


def _time_all(tasks: Sequence[_Task], pairs: int, ends: float, progress: Progress) -> list[str]:
    """Time the tasks that fit until the clock says `ends`; what did not, in a sentence each."""
    left_out, begun = [], []
    for task in tasks:
        left = ends - time.perf_counter()
        if task.about > left:
            said = f"about {task.about:.0f} s, {max(0.0, left):.0f} s were left"
            left_out.append(f"{task.what} not measured: it would have taken {said}")
            continue
        task.found = [task.once()]  # all there is, where no other pair fits
        begun.append(task)
    for i, task in enumerate(begun):
        # each that follows is to have a pair that counts
        left = ends - time.perf_counter() - sum(other.whole for other in begun[i + 1 :])
        count = _odd(min(pairs, left / task.whole))
        for n in range(count):
            again = task.once()
            task.found = [again] if n == 0 else [*task.found, again]
            progress((i + (n + 1) / count) / len(begun))
            if n % 2 == 0 and time.perf_counter() + 2 * task.whole > ends:  # slower than it was
                break
    return left_out


def _odd(count: float) -> int:
    """The largest odd number up to `count`, or 0."""
    return 0 if count < 1 else (int(count) - 1) // 2 * 2 + 1


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
    return _in_turn(
        [partial(_decoded, model, ids, prompt, after) for model, after in zip(models, read, strict=True)], rounds
    )


def _reading(model: LanguageModel, fp32: LanguageModel, ids: Tensor, cost: _Cost) -> _Task:
    """Prompts `ids [b, l]`."""
    batch = ids.shape[0]
    return _Task(
        f"prefill of {batch}", batch, ids.numel(), lambda: (_read(model, ids), _read(fp32, ids)), cost.of(ids.numel())
    )


def _decoding(model: LanguageModel, fp32: LanguageModel, ids: Tensor, cost: _Cost) -> _Task:
    """Half of each window `ids [b, l]` is the prompt, and what follows it is decoded."""
    batch, prompt = ids.shape[0], ids.shape[1] // 2
    steps = min(_DECODED, ids.shape[1] - prompt)
    ids, read = ids[:, : prompt + steps], list[Decoding]()

    def pair() -> tuple[float, float]:
        if not read:
            read.extend(prefill(one, ids[:, :prompt]) for one in (model, fp32))
        return _decoded(model, ids, prompt, read[0]), _decoded(fp32, ids, prompt, read[1])

    about = cost.of(ids.numel(), 1 + steps)
    return _Task(f"decoding of {batch}", batch, batch * steps, pair, about, prompt)


def _prefill(task: _Task) -> Prefill:
    return Prefill(task.batch, *_rates(task), pairs=len(task.found))


def _decode(task: _Task) -> Decode:
    assert task.prompt is not None
    return Decode(task.batch, task.prompt, task.tokens // task.batch, *_rates(task), pairs=len(task.found))


def _rates(task: _Task) -> tuple[float, float, float]:
    """Tokens a second, ours and FP32's, and the speedup."""
    ours, theirs = zip(*task.found, strict=True)
    return (
        task.tokens / statistics.median(ours),
        task.tokens / statistics.median(theirs),
        statistics.median(b / a for a, b in task.found),
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


def _decoded(model: LanguageModel, ids: Tensor, prompt: int, after: Decoding) -> float:
    """Seconds in which a model decodes the tokens of `ids [b, l]` after the first `prompt`, whose state is `after`."""
    tokens = ids[:, prompt:].to(model.device).unbind(dim=1)
    decoder = open_decoder(model, after)
    _synchronize(model)
    began = time.perf_counter()
    for column in tokens:
        decoder.step(column)
    _synchronize(model)
    return time.perf_counter() - began


def _synchronize(model: LanguageModel) -> None:
    """Wait for what a GPU still has to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
