"""A format that only the tests know: arrays in one `.npz`, read by numpy, with a runtime that does as it is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Arrays, Encoding, Format
from ssm_mp.runtimes.verify import ours

FLOAT32 = ("A_log", "D", "norm", "dt_bias")
"""Kinds that it keeps float32."""
_ANSWER = (
    "import json, sys, numpy as np; ids = np.load(sys.argv[2]); held = np.load(sys.argv[1]);"
    "found = held['@answers'][:ids.shape[0], :ids.shape[1]];"
    "np.save(sys.argv[3], found.astype(np.float32));"
    "print(json.dumps({'tokens': ids.size, 'seconds': 0.5}))"
)
_ENDINGS = {
    "answers": _ANSWER,
    "fails": "import sys; print('no such operator', file=sys.stderr); sys.exit(4)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "says nothing": "pass",
    "answers in another shape": _ANSWER.replace("held['@answers']", "held['@answers'][..., 0]"),
    "answers for other tokens": _ANSWER.replace("held['@answers']", "held['@answers'][..., :-1]"),
}


@dataclass(frozen=True)
class Plain(Format):
    """Holds float16 and int8 in rows of whole eights; norms, convolutions and values float32.

    ids: the windows whose answers it writes into the file, `[w, l]`. ending: what its runtime does.
    off: what is added to the answers' logits of the first token. spoils: whether what is written is not what was asked.
    twins: whether it has room for a model of float32.
    """

    ids: np.ndarray
    ending: str = "answers"
    off: float = 0.0
    spoils: bool = False
    twins: bool = True

    word, runtime, extra, packages = "plain", "numpy", "plain", ("numpy",)
    inputs, suffix, largest_divergence = "none", ".npz", 1e-6
    modules: tuple[str, ...] = ("numpy",)
    writer: tuple[str, ...] = ("numpy",)
    reader: tuple[str, ...] = ("numpy",)

    def refusal(self, config: Config) -> str | None:
        return "an embedding in blocks is one table here" if config.embedding_blocks else None

    def refusal_of(self, item: Exportable) -> str | None:
        return "no room" if item.precision_map is None and not self.twins else super().refusal_of(item)

    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        first = component.parameters[0]
        if len(first.shape) != 2 or component.kind in FLOAT32:
            return Encoding("float32", 4 * component.count)
        biases = 4 * (component.count - first.shape[0] * first.shape[1])
        if precision == "fp16":
            return Encoding("float16", 2 * first.shape[0] * first.shape[1] + biases)
        if precision == "int8" and first.shape[1] % 8 == 0:
            return Encoding("int8", first.shape[0] * first.shape[1] + 2 * first.shape[0] + biases)
        return None

    def write(self, item: Exportable, path: Path) -> None:
        held: dict[str, np.ndarray] = {}
        for name, (parameter, stored) in item.stored().items():
            matrix = parameter.role == "weight" and len(parameter.shape) == 2 and parameter.kind not in FLOAT32
            if matrix and isinstance(stored, Int8Tensor):
                held[f"{name}@q"], held[f"{name}@s"] = stored.q.numpy(), stored.scale.numpy()[:, None]
            elif matrix and isinstance(stored, FloatTensor):
                held[name] = stored.value.numpy()
            else:
                held[name] = stored.tensor().numpy()
        if self.spoils:
            name = next(iter(held))
            held[name] = held[name] + held[name].dtype.type(1)
        answers = ours(item.model, self.ids).log_probabilities
        answers[..., 0] += self.off
        held["@answers"] = answers
        np.savez(path, allow_pickle=False, **held)

    def expected(self, item: Exportable) -> Arrays:
        return {name: partial(_values, stored) for name, (_, stored) in item.stored().items()}

    def read(self, path: Path) -> Arrays:
        held = np.load(path)
        names = {name.partition("@")[0] for name in held.files} - {""}
        return {name: partial(_restored, held, name) for name in names}

    def tensor_bytes(self, path: Path) -> int:
        held = np.load(path)
        return sum(held[name].nbytes for name in held.files if name != "@answers")

    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        return [sys.executable, "-c", _ENDINGS[self.ending], str(path), str(ids), str(out)]

    def command(self, path: Path, item: Exportable) -> str:
        return f"python -c 'import numpy; numpy.load({str(path)!r})'"


def _values(stored: Stored) -> np.ndarray:
    found: np.ndarray = stored.tensor().numpy()
    return found


def _restored(held: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    if name in held.files:
        return np.asarray(held[name], np.float32)
    return np.asarray(held[f"{name}@q"], np.float32) * np.asarray(held[f"{name}@s"], np.float32)
