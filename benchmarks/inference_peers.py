"""Other people's ways of reading and decoding what ours do: torchao's model, and llama.cpp on the exported map.

Each is held against our logits before it is timed: a wrong result is no faster way to the right one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference_models import Case, Converted
from benchmarks.inference_ways import LLAMA_CPP, TORCHAO, Once, Ways
from benchmarks.llama_cpp import WAITS, Served
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.decoding.decode import prefill
from ssm_mp.errors import ExportError
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.gguf.format import GGUF
from ssm_mp.runtimes.running import cannot_verify
from ssm_mp.runtimes.transfer import Transferred, transfer

_MOST_OFF, _MOST_OFF_LLAMA_CPP = 0.3, 0.1
"""How far logits may be off, relative to their size: torchao rounds weights anew, llama.cpp only inputs."""
_ASKED = 32
"""Tokens that llama.cpp's distributions are compared on, as an export does."""
_TRIES = 2


@dataclass(eq=False)
class Peers:
    """Ways of others, why some are left out, and how llama.cpp's files hold a map."""

    reading: dict[str, Once] = field(default_factory=dict)
    decoding: dict[str, Once] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    exported: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, ways: Ways) -> None:
        """Further ways."""
        self.reading |= ways[0]
        self.decoding |= ways[1]


def find_peers(
    case: Case, checkpoint: Checkpoint, converted: Mapping[str, Converted], expected: Tensor, ids: Tensor,
    stack: ExitStack, threads: int,
) -> Peers:  # fmt: skip
    """All that can be had here. expected: our FP32 logits `[1, V]` after `ids [1, l]`. stack: holds their processes."""
    found = Peers()
    if case.torchao:
        try:
            say("compiling torchao's model")
            found.add(torchao_ways(checkpoint, expected, ids, case.steps))
        except ModuleNotFoundError as error:
            if error.name != "torchao":
                raise
            found.left_out[TORCHAO] = str(error)
    else:
        found.left_out[TORCHAO] = "there is no plain model of this one"
    unasked = cannot_verify(GGUF)
    for way in case.exported:
        name = f"{LLAMA_CPP}-{way.removesuffix('-static')}"
        if unasked:
            found.left_out[name] = unasked
            continue
        say(f"exporting {way} to llama.cpp")
        try:
            found.add(_llama_cpp_ways(name, checkpoint, converted[way], ids, case.steps, found, stack, threads))
        except ExportError as error:
            found.left_out[name] = str(error)
    for name, why in found.left_out.items():
        say(f"{name} is left out: {why}")
    return found


def torchao_ways(checkpoint: Checkpoint, expected: Tensor, ids: Tensor, steps: int) -> Ways:
    """Reading and decoding the same by torchao's model, compiled in two ways.

    expected: our FP32 logits `[1, V]` after `ids [1, l]`. Raises ModuleNotFoundError where torchao is not installed.
    """
    from benchmarks.torchao_model import compiled, dynamic_int8

    assert isinstance(checkpoint.config, MambaConfig)
    model = dynamic_int8(checkpoint.config, checkpoint.tensors)
    prompt = 3 * ids.shape[1] // 4
    tokens = [token.repeat(2) for token in ids[:, prompt : prompt + steps].unbind(dim=1)]
    with torch.no_grad():
        _, states = model.read(ids[:, :prompt].repeat(2, 1))
        after, _ = model.read(ids[:, : prompt + steps])

    def decoded(step: Callable[..., Any]) -> Tensor:
        held, logits = states, torch.empty(0)
        for i, token in enumerate(tokens):
            logits, held = step(token, held, torch.tensor([prompt + i]))
        return logits[:1]

    reading: dict[str, Once] = {}
    decoding: dict[str, Once] = {}
    for name, freezing in ((TORCHAO, False), (f"{TORCHAO}-freezing", True)):
        read, step = compiled(model.read, freezing), compiled(model.step, freezing)
        began = time.perf_counter()
        with torch.no_grad():
            require_near(read(ids)[0], expected, _MOST_OFF, f"{name}'s prefill")
            require_near(decoded(step), after, _MOST_OFF, f"{name}'s decoding")
        say(f"{name}: compiled in {time.perf_counter() - began:.0f} s")
        reading[name] = _without_gradients(lambda read=read: read(ids))  # type: ignore[misc]
        decoding[name] = _without_gradients(lambda step=step: decoded(step))  # type: ignore[misc]
    return reading, decoding


def _llama_cpp_ways(
    name: str, checkpoint: Checkpoint, held: Converted, ids: Tensor, steps: int, peers: Peers, stack: ExitStack,
    threads: int,
) -> Ways:  # fmt: skip
    """Reading and decoding by llama.cpp, whose file is verified as an export's is. Raises ExportError where it holds
    no such model, or disagrees."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    item = Exportable(name, held.model, held.map, checkpoint.source)
    done = transfer(GGUF, item, folder / "model.gguf", widen=True, windows=ids[:, :_ASKED].numpy())
    assert done.verdict is not None, done.unverified
    served, waits = opened_fastest(done.path, ids, steps, threads, stack)
    prompt = 3 * ids.shape[1] // 4
    for once, read, phase in (
        (served.prefill, ids, "prefill"), (served.decode, ids[:, : prompt + steps], "decoding"),
    ):  # fmt: skip
        once()
        expected = prefill(done.item.model, read).logits[0]
        require_near(torch.from_numpy(served.logits()), expected, _MOST_OFF_LLAMA_CPP, f"{name}'s {phase}")
    peers.exported[name] = told(done, waits)
    return {name: served.prefill}, {name: served.decode}


def told(done: Transferred, waits: str) -> dict[str, Any]:
    """How a file holds a map, by type, what is wider in it than asked for, what llama.cpp said of it, and how its
    threads wait."""
    words: dict[str, int] = {}
    for encoding in done.plan.encodings.values():
        words[encoding.word] = words.get(encoding.word, 0) + 1
    widened: dict[str, int] = {}
    for component, (asked, stored) in done.plan.widened.items():
        change = f"{component.rsplit('.', 1)[-1]}: {asked} as {stored}"
        widened[change] = widened.get(change, 0) + 1
    assert done.verdict is not None
    return {
        "components": words, "widened": widened, "bytes": done.plan.bytes, "verdict": done.verdict.sentence,
        "perplexity": done.verdict.perplexity, "perplexity_here": done.verdict.perplexity_here, "waits": waits,
    }  # fmt: skip


def opened_fastest(path: Path, ids: Tensor, steps: int, threads: int, stack: ExitStack) -> tuple[Served, str]:
    """The file in a process whose threads wait in the way that is faster now, and which way that is."""
    tried: dict[str, tuple[float, Served]] = {}
    for waits in WAITS:
        served = Served(path, ids[0].numpy(), steps, threads, waits)
        stack.callback(served.close)
        tried[waits] = min(served.prefill() + served.decode() for _ in range(_TRIES)), served
    best = min(tried, key=lambda waits: tried[waits][0])
    for waits, (_, served) in tried.items():
        if waits != best:
            served.close()
    return tried[best][1], best


def require_near(found: Tensor, expected: Tensor, most: float, what: str) -> None:
    """That logits are those of the same model, quantised. Raises RuntimeError."""
    error = float((found - expected).norm() / expected.norm())
    if not error < most:
        raise RuntimeError(f"{what}: logits are {error:.3g} off, relative to their size")


def _without_gradients(run: Callable[[], object]) -> Once:
    def once() -> float:
        with torch.no_grad():
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

    return once


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr)
