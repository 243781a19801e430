"""Bytes, memory and speed of a converted model, as ratios to the FP32 model measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_mp.artifact import tensor_bytes
from ssm_mp.data import Windows
from ssm_mp.models import LanguageModel


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
        }


def benchmark(
    model: LanguageModel,
    fp32: LanguageModel,
    windows: Windows,
    *,
    file_bytes: int | None = None,
    batches: Sequence[int] = (1, 32),
    pairs: int = 7,
) -> Benchmark:
    """Measure `model` beside `fp32` on the same windows, the two in turn; windows repeat where a batch needs more."""
    repeats = -(-max(batches) // len(windows))
    ids = windows.ids.repeat(repeats, 1)
    return Benchmark(
        stored_bytes=tensor_bytes(model),
        file_bytes=file_bytes,
        fp32_bytes=tensor_bytes(fp32),
        resident_bytes=resident_bytes(model),
        fp32_resident_bytes=resident_bytes(fp32),
        prefill=tuple(_prefill(model, fp32, ids[:batch], pairs) for batch in batches),
    )


def resident_bytes(model: LanguageModel) -> int:
    """Bytes of all storages behind a model's parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _prefill(model: LanguageModel, fp32: LanguageModel, ids: Tensor, pairs: int) -> Prefill:
    ours, theirs = [], []
    with torch.inference_mode():
        for pair in range(pairs + 1):
            times = (_seconds(model, ids), _seconds(fp32, ids))
            if pair:  # the first pair warms up
                ours.append(times[0])
                theirs.append(times[1])
    return Prefill(
        batch=ids.shape[0],
        tokens_per_second=ids.numel() / statistics.median(ours),
        fp32_tokens_per_second=ids.numel() / statistics.median(theirs),
        speedup=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    )


def _seconds(model: LanguageModel, ids: Tensor) -> float:
    device = next(model.parameters()).device
    ids = ids.to(device)
    began = time.perf_counter()
    model.head(model.hidden(ids)[:, -1:])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
