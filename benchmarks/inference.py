"""Prefill and decode of converted models and of `torchao`'s, over our FP32 model, and peak memory, in one run.

    pip install --constraint constraints.txt '.[bench]'
    python -m benchmarks.inference [--json] [--only NAME …] [--run runs/reference]      # about ten minutes on two cores
    python -m benchmarks.inference --device cuda [--batch 32]

All ways run in turn, round after round; figures are medians, speedups medians of the ratios round by round. Prefill
reads one prompt and ends with the logits of its last token; decode makes one token after another of one sequence.
`--batch`: of so many sequences at once, which a GPU needs to be filled.

The winner of the reference is that of a finished search (`--run`, where there is one). Without one, and at the 130m
shape, whose random weights cannot be searched, it is what a search over int8 and fp16 finds on the reference:
embeddings and projections int8, convolutions, norms, `A_log` and `D` fp16.

`torchao` is dynamic INT8 on a plain Mamba (`benchmarks/torchao_model.py`), the faster of its two ways to be compiled;
without the package it is left out. Memory is of a process that loads the file, reads a prompt and decodes. Both are
measured on a CPU only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.memory import measure_apart
from benchmarks.shapes import checkpoint_of, random_windows, workspace_of
from benchmarks.stacking import seconds as seconds_on
from search.problem.run_directory import WINNER
from ssm_mp.artifact import MAP, save_artifact
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.decoding.decode import open_decoder, prefill
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme

PROMPTS = {"reference": 128, "130m": 512}
"""Tokens of the prompt that is read; decoding goes on after three quarters of it."""
STEPS = {"reference": 32, "130m": 16}
ROUNDS = {"reference": 15, "130m": 7}
FP32, TORCHAO = "fp32", "torchao"
CONVERTED = ("fp16", "int8-static", "int8-dynamic", "winner")
_WINNER_FP16 = ("conv1d", "norm", "A_log", "D")

Once = Callable[[], float]
"""Does something once; seconds."""


@dataclass(frozen=True, eq=False)
class Converted:
    """A model with what an artifact of it says."""

    model: LanguageModel
    map: PrecisionMap
    scheme: Scheme


def convert_all(
    checkpoint: Checkpoint, winner: Mapping[str, str] | None, device: str = "cpu"
) -> dict[str, Converted]:  # fmt: skip
    """The converted models by name; `winner`: its map, where a search found one."""
    found: dict[str, Converted] = {}
    for activations in ("static", "dynamic"):
        # the quickest rule for scales: speed does not depend on them
        overrides = [f'precision.activations="{activations}"', 'precision.weight_scale="minmax"']
        converter = workspace_of(checkpoint, 1, [*overrides, f'search.device="{device}"']).converter
        components = converter.components
        everywhere = PrecisionMap.uniform("int8", components)
        maps = {f"int8-{activations}": everywhere}
        if activations == "static":
            rule = {c.name: "fp16" if c.kind in _WINNER_FP16 else "int8" for c in components}
            names = winner or rule
            maps["fp16"] = PrecisionMap.uniform("fp16", components)
            maps["winner"] = PrecisionMap(tuple((c.name, names[c.name]) for c in components))
        found |= {name: Converted(converter.convert(held), held, converter.scheme) for name, held in maps.items()}
    return {name: found[name] for name in CONVERTED}


def winner_of(run: Path) -> dict[str, str] | None:
    """The map of a finished run's winner; None where there is none, or one of a split embedding."""
    path = run / WINNER / MAP
    if not path.is_file():
        return None
    held: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["map"]
    return held if "embedding" in held else None


def prefill_ways(models: Mapping[str, LanguageModel], ids: Tensor) -> dict[str, Once]:
    """Reading `ids [b, l]` by each of our models."""

    def way(model: LanguageModel) -> Once:
        return lambda: seconds_on(lambda: prefill(model, ids), model.device)

    return {name: way(model) for name, model in models.items()}


def decode_ways(models: Mapping[str, LanguageModel], ids: Tensor, steps: int) -> dict[str, Once]:
    """Decoding `steps` tokens by each of our models, after the first three quarters of `ids [b, l]`."""
    prompt = 3 * ids.shape[1] // 4
    tokens = ids[:, prompt : prompt + steps].unbind(dim=1)

    def way(model: LanguageModel) -> Once:
        read = prefill(model, ids[:, :prompt])

        def once() -> float:
            decoder = open_decoder(model, read)
            return seconds_on(lambda: [decoder.step(token) for token in tokens], model.device)

        return once

    return {name: way(model) for name, model in models.items()}


def torchao_ways(checkpoint: Checkpoint, expected: Tensor, ids: Tensor, steps: int) -> tuple[dict[str, Once], ...]:
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
            _require_near(read(ids)[0], expected, f"{name}'s prefill")
            _require_near(decoded(step), after, f"{name}'s decoding")
        _say(f"{name}: compiled in {time.perf_counter() - began:.0f} s")
        reading[name] = _without_gradients(lambda read=read: read(ids))  # type: ignore[misc]
        decoding[name] = _without_gradients(lambda step=step: decoded(step))  # type: ignore[misc]
    return reading, decoding


def _require_near(found: Tensor, expected: Tensor, what: str) -> None:
    """That logits are those of the same model, quantised: a wrong result is no faster way to the right one."""
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.3:
        raise RuntimeError(f"{what}: logits are {error:.3g} off, relative to their size")


def _without_gradients(run: Callable[[], object]) -> Once:
    def once() -> float:
        with torch.no_grad():
            return _seconds(run)

    return once


def in_turn(ways: Mapping[str, Once], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; a round to warm up is not counted."""
    found = [{name: once() for name, once in ways.items()} for _ in range(rounds + 1)]
    return {name: [seconds[name] for seconds in found[1:]] for name in ways}


def summarise(seconds: Mapping[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Of each way: tokens a second and speedup over FP32; torchao's is its faster one."""
    found = {
        name: {
            "tokens_per_second": tokens / statistics.median(spent),
            "speedup": statistics.median(a / b for a, b in zip(seconds[FP32], spent, strict=True)),
        }
        for name, spent in seconds.items()
    }
    compiled = [name for name in found if name.startswith(TORCHAO)]
    if compiled:
        found["torchao-default"] = found[TORCHAO]
        found[TORCHAO] = max((found[name] for name in compiled), key=lambda row: row["speedup"])
    return found


def measure(name: str, winner: Mapping[str, str] | None, device: str, batch: int) -> dict[str, Any]:
    """One shape: speeds, and on a CPU memory."""
    checkpoint = checkpoint_of(name)
    config = checkpoint.config
    ids = random_windows(config.vocabulary, batch, PROMPTS[name]).ids
    converted = convert_all(checkpoint, winner, device)
    models = {FP32: build(config, {n: tensor.to(device) for n, tensor in checkpoint.tensors.items()})}
    models |= {n: held.model for n, held in converted.items()}
    memory: dict[str, dict[str, float]] = {}
    if device == "cpu":
        _say(f"{name}: memory")
        memory = measure_memory(checkpoint, converted)
    ids = ids.to(device)
    reading, decoding = prefill_ways(models, ids), decode_ways(models, ids, STEPS[name])
    if device == "cpu" and batch == 1:
        theirs = _torchao_where_it_is(name, checkpoint, models[FP32], ids)
        reading, decoding = reading | theirs[0], decoding | theirs[1]
    _say(f"{name}: speeds")
    return {
        "prefill": summarise(in_turn(reading, ROUNDS[name]), ids.numel()),
        "decode": summarise(in_turn(decoding, ROUNDS[name]), batch * STEPS[name]),
        "memory": memory,
        "winner": "of a search" if winner else "by rule",
        "batch": batch,
        "prompt": PROMPTS[name],
        "decoded_after": 3 * PROMPTS[name] // 4,
        "steps": STEPS[name],
    }


def _torchao_where_it_is(
    name: str, checkpoint: Checkpoint, model: LanguageModel, ids: Tensor
) -> tuple[dict[str, Once], ...]:
    """`torchao_ways`; none without the package."""
    try:
        _say(f"{name}: compiling torchao's model")
        return torchao_ways(checkpoint, prefill(model, ids).logits, ids, STEPS[name])
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise
        _say(f"torchao is left out: {error}")
        return {}, {}


def measure_memory(checkpoint: Checkpoint, converted: Mapping[str, Converted]) -> dict[str, dict[str, float]]:
    """Of FP32 and of each converted model, by process: bytes before, loaded, at the peak; the ratio of the peaks'
    growth to FP32's, and of the whole peaks."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {FP32: Path(folder) / "fp32.safetensors"}
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, paths[FP32])
        for name, held in converted.items():
            paths[name] = save_artifact(Path(folder) / name, held.model, held.map, held.scheme, {})
        gc.collect()
        found = {name: measure_apart(path) for name, path in paths.items()}
    whole = found[FP32]
    return {
        name: {
            **row,
            "ratio": (row["peak"] - row["before"]) / (whole["peak"] - whole["before"]),
            "ratio_with_process": row["peak"] / whole["peak"],
        }
        for name, row in found.items()
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def to_json(measured: Mapping[str, dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """The speedups by shape and way, and everything else beside them."""

    def speedups(row: dict[str, Any]) -> dict[str, dict[str, float]]:
        ways = [way for way in (*CONVERTED, TORCHAO) if way in row["prefill"]]
        return {way: {phase: row[phase][way]["speedup"] for phase in ("prefill", "decode")} for way in ways}

    return {
        "speedup": {name: speedups(row) for name, row in measured.items()},
        "measured": dict(measured),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _print(found: dict[str, Any]) -> None:
    cpu = f"{found['threads']} threads, {found['cpu_capability']}"
    print(f"{cpu if found['device'] == 'cpu' else found['device']}, torch {found['torch']}")
    for name, row in found["measured"].items():
        prompts = f"{row['batch']} prompts" if row["batch"] > 1 else "a prompt"
        print(f"{name}: {prompts} of {row['prompt']} tokens, {row['steps']} steps; winner {row['winner']}")
        print("                    prefill tokens/s  over FP32  decode tokens/s  over FP32  peak MiB  over FP32")
        for way in row["prefill"]:
            read, step, memory = row["prefill"][way], row["decode"][way], row["memory"].get(way)
            held = (
                "" if memory is None else f"{(memory['peak'] - memory['before']) / 2**20:8.0f} {memory['ratio']:9.2f}"
            )
            print(
                f"  {way:18} {read['tokens_per_second']:15.0f} {read['speedup']:9.2f}×"
                f" {step['tokens_per_second']:15.1f} {step['speedup']:9.2f}×  {held}"
            )


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=tuple(PROMPTS), default=tuple(PROMPTS))
    arguments.add_argument("--run", type=Path, default=Path("runs/reference"))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch", type=int, default=1)
    given = arguments.parse_args()
    winner = winner_of(given.run)
    of_shape = {name: winner if name == "reference" else None for name in given.only}
    measured = {name: measure(name, held, given.device, given.batch) for name, held in of_shape.items()}
    found = to_json(measured, given.device)
    if given.json:
        print(json.dumps(found))
    else:
        _print(found)


if __name__ == "__main__":
    main()
