"""Run by ONNX Runtime alone, in a process of its own: token ids through the step of one token, again and again.

    python run.py model.onnx ids.npy out.npy

ids: int64 `[w, l]`. Writes float32 log-probabilities `[w, l, V]`, and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime


class Loop:
    """Sequences side by side: tokens in, logits out, states carried."""

    def __init__(self, path: str, sequences: int) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.said = self.session.get_modelmeta().custom_metadata_map
        self.states = json.loads(self.said["ssm_mp.states"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.asks_position = "position" in {value.name for value in self.session.get_inputs()}
        sizes = {"b": sequences, "t": 0}
        self.carried = {
            state["name"]: _value(np.zeros([sizes.get(size, size) for size in state["shape"]], dtype=np.float32))
            for state in self.states
        }
        self.position = 0

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens [b]` → logits `[b, V]`."""
        given = {"ids": _value(np.ascontiguousarray(tokens[:, None])), **self.carried}
        if self.asks_position:
            given["position"] = _value(np.array([self.position]))
        found = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, given), strict=True))
        self.carried = {state["name"]: found[state["new"]] for state in self.states}
        self.position += 1
        logits: np.ndarray = found["logits"].numpy()[:, 0]
        return logits


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def main(path: str, ids_path: str, out_path: str) -> None:
    """Write the log-probabilities of every token after each."""
    ids = np.load(ids_path)
    loop, out = Loop(path, ids.shape[0]), None
    seconds = 0.0
    for i in range(ids.shape[1]):
        began = time.perf_counter()
        logits = loop.step(ids[:, i])
        seconds += time.perf_counter() - began
        if out is None:
            shape = (*ids.shape, logits.shape[1])
            out = np.lib.format.open_memmap(out_path, mode="w+", dtype=np.float32, shape=shape)
        out[:, i] = _log_softmax(logits)
    assert out is not None
    out.flush()
    print(json.dumps({"tokens": int(ids.size), "seconds": seconds}))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of `logits [b, V]`, float32; summed in float64."""
    below = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(below, dtype=np.float64).sum(axis=1, keepdims=True))
    found: np.ndarray = (below - total).astype(np.float32)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
