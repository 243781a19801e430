"""Reads token ids with mlx-lm and writes log-probabilities: a process of its own, which needs only numpy and mlx-lm.

Dimensions: `w` windows, `l` length, `V` vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main(folder: str, ids_file: str, out_file: str) -> None:
    """Ids `[w, l]` → float32 log-probabilities `[w, l, V]`, one window after another."""
    ids = np.load(ids_file)
    model, _ = load_model(Path(folder))
    out = None
    seconds = 0.0
    for i, window in enumerate(ids):
        start = time.perf_counter()
        logits = model(mx.array(window[None])).astype(mx.float32)[0]  # [l, V]
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(scores)
        seconds += time.perf_counter() - start
        if out is None:
            shape = (*ids.shape, scores.shape[-1])
            out = np.lib.format.open_memmap(out_file, mode="w+", dtype=np.float32, shape=shape)
        out[i] = np.array(scores)
    if out is not None:
        out.flush()
    print(json.dumps({"tokens": int(ids.size), "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
