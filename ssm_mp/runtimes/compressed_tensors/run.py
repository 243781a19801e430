"""Reads token ids with transformers and writes log-probabilities: a process of its own, which needs nothing of ours.

Dimensions: `w` windows, `l` length, `V` vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: str, ids_file: str, out_file: str) -> None:
    """Ids `[w, l]` → float32 log-probabilities `[w, l, V]`, one window after another."""
    ids = np.load(ids_file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
        if report.get(kind):
            sys.exit(f"transformers says {kind}: {list(report[kind])[:5]}")
    model.eval()
    out = None
    seconds = 0.0
    for i, window in enumerate(ids):
        start = time.perf_counter()
        with torch.inference_mode():
            logits = model(torch.from_numpy(window)[None], use_cache=False).logits[0]  # [l, V]
            scores = torch.log_softmax(logits.float(), dim=-1)
        seconds += time.perf_counter() - start
        if out is None:
            shape = (*ids.shape, scores.shape[-1])
            out = np.lib.format.open_memmap(out_file, mode="w+", dtype=np.float32, shape=shape)
        out[i] = scores.numpy()
    if out is not None:
        out.flush()
    print(json.dumps({"tokens": int(ids.size), "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
