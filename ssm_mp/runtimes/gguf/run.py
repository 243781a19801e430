"""Let llama.cpp read token ids: `python -P run.py FILE.gguf ids.npy out.npy`, a process of its own.

It reads int64 ids `[w, l]` and writes float32 log-probabilities `[w, l, V]`; the last line that it prints is JSON,
`{"tokens": …, "seconds": …}`. Where llama.cpp refuses the file, its own words go to stderr and the exit status is 1; a
file that it does not survive ends the process with a signal.

The library within the package `xllamacpp` is called as the C library that it is: one call gives every logit of a
window, where the package's own server gives them as JSON, one prefix a call. The structures below are those of
`llama.h` at the pinned version; `checked` holds them against the defaults that the library states itself.

Dimensions: `w` windows, `l` length, `V` vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32, FLOAT16 = 0, 1
"""Of `enum ggml_type`."""
NO_FLASH_ATTENTION, AUTOMATIC = 0, -1
"""Of `enum llama_flash_attn_type`."""
WARNING, ERROR = 3, 4
"""Of `enum ggml_log_level`."""
MOST_TOKENS = 512
"""Tokens that are read at once, so that their logits do not fill the memory."""


class ModelParams(Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool), ("room", c_int8 * 64),
    )  # fmt: skip


class ContextParams(Structure):
    """`struct llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int), ("rope_scaling_type", c_int),
        ("pooling_type", c_int), ("attention_type", c_int), ("flash_attn_type", c_int), ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int),
        ("type_v", c_int), ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("further", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool),
        ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
        ("room", c_int8 * 64),
    )  # fmt: skip


class Batch(Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


Log = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
"""`ggml_log_callback`."""

_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": AUTOMATIC, "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": FLOAT16,
    "type_v": FLOAT16, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
}  # fmt: skip
"""What the library states where it is laid out as above; everything else is zero."""
_MACHINE = ("n_threads", "n_threads_batch", "room")
"""Fields that say nothing of the layout."""


class RunError(Exception):
    """llama.cpp cannot be asked, or refuses; the message is for people."""


class Library:
    """The C functions of llama.cpp, and what it has said since it was loaded."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("xllamacpp.xllamacpp")
        if found is None or found.origin is None:
            raise RunError("xllamacpp is not installed")
        self.version = importlib.metadata.version("xllamacpp")
        self.lines: list[str] = []
        self._log = Log(self._heard)
        self.c = ctypes.CDLL(found.origin)
        for name, result, arguments in (
            ("llama_log_set", None, (Log, c_void_p)), ("llama_backend_init", None, ()),
            ("llama_model_default_params", ModelParams, ()), ("llama_context_default_params", ContextParams, ()),
            ("llama_model_load_from_file", c_void_p, (c_char_p, ModelParams)),
            ("llama_model_get_vocab", c_void_p, (c_void_p,)), ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
            ("llama_init_from_model", c_void_p, (c_void_p, ContextParams)), ("llama_get_memory", c_void_p, (c_void_p,)),
            ("llama_memory_clear", None, (c_void_p, c_bool)), ("llama_decode", c_int32, (c_void_p, Batch)),
            ("llama_get_logits", POINTER(c_float), (c_void_p,)), ("llama_n_ctx", c_uint32, (c_void_p,)),
            ("llama_n_ubatch", c_uint32, (c_void_p,)),
        ):  # fmt: skip
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.c.llama_log_set(self._log, None)
        self.c.llama_backend_init()

    def _heard(self, level: int, text: bytes | None, data: object) -> None:
        if level in (WARNING, ERROR):
            self.lines.append((text or b"").decode(errors="replace"))

    def said(self) -> str:
        """Its last complaints, for a message."""
        return "".join(self.lines[-12:]).strip()

    def model(self, path: Path) -> int:
        """A loaded model."""
        params = self.checked(self.c.llama_model_default_params(), _MODEL_DEFAULTS)
        params.n_gpu_layers = 0
        loaded: int | None = self.c.llama_model_load_from_file(os.fsencode(path), params)
        if not loaded:
            raise RunError(f"llama.cpp does not load {path}:\n{self.said()}")
        return loaded

    def context(self, model: int, length: int, *, exact: bool = True) -> int:
        """A context for windows of `length`.

        exact: keys and values float32, attention written out, so that it computes what is compared; by default
        llama.cpp rounds both to float16.
        """
        params = self.checked(self.c.llama_context_default_params(), _CONTEXT_DEFAULTS)
        params.n_ctx = length
        params.n_batch = params.n_ubatch = min(length, MOST_TOKENS)
        params.n_threads = params.n_threads_batch = _threads()
        if exact:
            params.flash_attn_type = NO_FLASH_ATTENTION
            params.type_k = params.type_v = FLOAT32
        made: int | None = self.c.llama_init_from_model(model, params)
        if not made:
            raise RunError(f"llama.cpp makes no context:\n{self.said()}")
        if self.c.llama_n_ctx(made) < length or self.c.llama_n_ubatch(made) != params.n_ubatch:
            raise RunError(self._differs("n_ctx and n_ubatch of a context"))
        return made

    def checked(self, params: Any, defaults: Mapping[str, object]) -> Any:
        """Defaults as the library states them; raises RunError where its structures are others than those here."""
        for name, _ in params._fields_:
            value = getattr(params, name)
            if name not in _MACHINE and (value or 0) != defaults.get(name, 0):
                raise RunError(self._differs(f"{type(params).__name__}.{name} = {value}"))
        return params

    def _differs(self, what: str) -> str:
        return (
            f"xllamacpp {self.version} has other structures than expected ({what}); "
            "install the version in constraints.txt"
        )


def read(library: Library, context: int, ids: np.ndarray, out: np.ndarray) -> float:
    """Log-probabilities of windows `ids [w, l]` into `out [w, l, V]`; the seconds that llama.cpp took."""
    spent = 0.0
    for window, row in zip(ids, out, strict=True):
        library.c.llama_memory_clear(library.c.llama_get_memory(context), True)
        for start in range(0, len(window), MOST_TOKENS):
            part = slice(start, start + MOST_TOKENS)
            batch = batch_of(window[part], start)
            began = time.perf_counter()
            status = library.c.llama_decode(context, batch)
            if status:
                raise RunError(f"llama.cpp does not decode (status {status}):\n{library.said()}")
            logits = library.c.llama_get_logits(context)  # waits until they are there
            spent += time.perf_counter() - began
            row[part] = _log_softmax(np.ctypeslib.as_array(logits, row[part].shape))
    return spent


def batch_of(ids: np.ndarray, start: int, *, only_last: bool = False) -> Batch:
    """Tokens of one sequence, the first at position `start`; logits of all of them are wanted, or only of the last."""
    count = len(ids)
    wanted = [0 if only_last else 1] * (count - 1) + [1]
    sequence = ctypes.pointer(c_int32(0))
    return Batch(
        count, (c_int32 * count)(*ids.tolist()), None, (c_int32 * count)(*range(start, start + count)),
        (c_int32 * count)(*[1] * count), (POINTER(c_int32) * count)(*[sequence] * count),
        (c_int8 * count)(*wanted),
    )  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of `logits [l, V]`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    sums = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    found: np.ndarray = shifted - np.log(sums).astype(np.float32)
    return found


def _threads() -> int:
    """As many as there are processors for this process, or as OpenMP is told."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told):
        return int(told)
    here = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(here(0)) if here is not None else os.cpu_count() or 1


def main(arguments: list[str]) -> int:
    """The command."""
    if len(arguments) != 3:
        print("usage: run.py FILE.gguf ids.npy out.npy", file=sys.stderr)
        return 2
    file, ids_file, out_file = map(Path, arguments)
    ids = np.load(ids_file, allow_pickle=False)
    try:
        library = Library()
        model = library.model(file)
        vocabulary = library.c.llama_vocab_n_tokens(library.c.llama_model_get_vocab(model))
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise RunError(f"token ids from {ids.min()} to {ids.max()}, but the file has {vocabulary} tokens")
        context = library.context(model, ids.shape[1])
        out = np.lib.format.open_memmap(out_file, mode="w+", dtype=np.float32, shape=(*ids.shape, vocabulary))
        seconds = read(library, context, ids, out)
        out.flush()
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"tokens": int(ids.size), "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
