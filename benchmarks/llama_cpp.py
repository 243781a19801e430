"""llama.cpp timed in a process of its own, which reads and decodes whenever it is asked to.

    python -m benchmarks.llama_cpp FILE.gguf ids.npy STEPS      # a request a line in, a JSON object a line out

`prefill` is one call for all tokens `ids [l]`, `decode` one call a token, `STEPS` of them, after the first three
quarters of `ids`; both are answered by their seconds. Logits are wanted of the last token only, and no token is drawn
from them. What is not timed: how the memory is emptied, or put where the prompt has left it. `logits PATH` writes those
that the last call ended with, float32 `[V]`.

Settings are llama.cpp's own (attention as it chooses, keys and values float16), but for the threads, `OMP_NUM_THREADS`.
These wait for each other by spinning for a while, or by sleeping at once, `OMP_WAIT_POLICY=passive`: which is faster
depends on what else the processors do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from ctypes import c_size_t, c_uint8, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ssm_mp.runtimes.gguf.run import Batch, Library, RunError, batch_of

WAITS = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "passive"}}
"""How threads wait for each other: what the environment says of it."""


class Served:
    """A GGUF file opened in a process of its own, which is ended by `close`, or as a context."""

    def __init__(self, path: Path, ids: np.ndarray, steps: int, threads: int, waits: str) -> None:
        """ids: int64 `[l]`. threads: as many as torch has. waits: one of `WAITS`."""
        self.path, self._folder = path, tempfile.TemporaryDirectory()
        asked = Path(self._folder.name, "ids.npy")
        np.save(asked, ids)
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_NUM_THREADS": str(threads), "GGML_NO_BACKTRACE": "1", **WAITS[waits]}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.llama_cpp", str(path), str(asked), str(steps)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def prefill(self) -> float:
        """Seconds of reading all of `ids`."""
        return self._asked("prefill")

    def decode(self) -> float:
        """Seconds of all steps."""
        return self._asked("decode")

    def logits(self) -> np.ndarray:
        """Those that the last call ended with, float32 `[V]`."""
        path = Path(self._folder.name, "logits.npy")
        self._asked(f"logits {path}")
        found: np.ndarray = np.load(path)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()

    def _asked(self, request: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(request, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.path}: llama.cpp ended with exit code {self._process.wait()}")
        return float(json.loads(line)["seconds"])


class Session:
    """One context of llama.cpp that reads the same tokens again and again."""

    def __init__(self, library: Library, path: Path, ids: np.ndarray, steps: int) -> None:
        self._library, self._c = library, library.c
        for name, arguments in (
            ("llama_state_get_size", (c_void_p,)), ("llama_state_get_data", (c_void_p, c_void_p, c_size_t)),
            ("llama_state_set_data", (c_void_p, c_void_p, c_size_t)),
        ):  # fmt: skip
            function = getattr(self._c, name)
            function.restype, function.argtypes = c_size_t, arguments
        model = library.model(path)
        self._vocabulary = int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(model)))
        self._context = library.context(model, len(ids), exact=False)
        prompt = 3 * len(ids) // 4
        self._whole = batch_of(ids, 0, only_last=True)
        self._steps = [batch_of(ids[i : i + 1], i) for i in range(prompt, prompt + steps)]
        self._empty()
        self._run(batch_of(ids[:prompt], 0, only_last=True))
        self._state = (c_uint8 * self._c.llama_state_get_size(self._context))()
        self._state_bytes = int(self._c.llama_state_get_data(self._context, self._state, len(self._state)))

    def prefill(self) -> float:
        """Read everything; seconds."""
        self._empty()
        return self._timed([self._whole])

    def decode(self) -> float:
        """One token after another from where the prompt ends; seconds."""
        self._empty()
        if self._c.llama_state_set_data(self._context, self._state, self._state_bytes) != self._state_bytes:
            raise RunError(f"llama.cpp does not go back to a state of its own:\n{self._library.said()}")
        return self._timed(self._steps)

    def logits(self) -> np.ndarray:
        """Those of the last token that was read `[V]`."""
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (self._vocabulary,)).copy()

    def _timed(self, batches: list[Batch]) -> float:
        began = time.perf_counter()
        for batch in batches:
            self._run(batch)
        return time.perf_counter() - began

    def _run(self, batch: Batch) -> None:
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise RunError(f"llama.cpp does not decode (status {status}):\n{self._library.said()}")
        self._c.llama_get_logits(self._context)  # waits until they are there

    def _empty(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)


def main() -> None:
    """Answer requests until there are no more."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("ids", type=Path)
    arguments.add_argument("steps", type=int)
    given = arguments.parse_args()
    session = Session(Library(), given.file, np.load(given.ids), given.steps)
    for line in sys.stdin:
        request, _, rest = line.strip().partition(" ")
        seconds = 0.0
        if request == "logits":
            np.save(rest, session.logits())
        else:
            seconds = {"prefill": session.prefill, "decode": session.decode}[request]()
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
