"""Prefill and decode of converted models over our FP32 model, beside torchao and llama.cpp, and memory, in one run.

    pip install --constraint constraints.txt '.[bench,gguf]'
    python -m benchmarks.inference [--json] [--only CASE …] [--rounds N] [--runs runs]    # half an hour on two cores
    python -m benchmarks.inference --device cuda [--batch 32]

The cases are in `benchmarks/inference_models.py`. All ways of a case run in turn, round after round; figures are
medians, speedups medians of the ratios round by round. Prefill reads one prompt and ends with the logits of its last
token; decode makes one token after another of one sequence. `--batch`: of so many sequences at once, which a GPU needs
to be filled.

The winner is that of a finished search in `--runs`, by the name of its study, or made by a rule.

`torchao` is dynamic INT8 on a plain Mamba (`benchmarks/torchao_model.py`), the faster of its two ways to be compiled.
`llama.cpp` (`benchmarks/llama_cpp.py`) has the same map in a GGUF file, verified as an export is, in a process of its
own, with as many threads, its kind of waiting chosen beforehand; what the file cannot hold is stored wider, which is
told. Both are left out where they are not installed or know no such model, which is told, too. Memory is of a process
that loads the file, reads a prompt and decodes. All three are measured on a CPU only.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.inference_models import CASES, CONVERTED, Case, Converted, boundaries_of, convert_all, winner_of
from benchmarks.inference_peers import Peers, find_peers, say
from benchmarks.inference_ways import FP32, TORCHAO, decode_ways, in_turn, over_rivals, prefill_ways, summarise
from benchmarks.memory import measure_apart
from benchmarks.shapes import random_windows
from ssm_mp.artifact import save_artifact
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.decoding.decode import prefill
from ssm_mp.model import LanguageModel, build

THREADS = 2
ON_A_GPU = ("reference", "130m")
"""What is measured there where nothing is named."""
_PACKAGES = ("torchao", "xllamacpp")
_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp")
"""Of a processor, those that say which kernels it has instructions for."""


def measure(name: str, case: Case, runs: Path, device: str, batch: int, with_memory: bool = True) -> dict[str, Any]:
    """One case: speeds, and on a CPU peers and memory."""
    checkpoint = case.load()
    ids = random_windows(checkpoint.config.vocabulary, batch, case.prompt).ids
    winner = winner_of(runs / case.study, device) if case.study else None
    converted = convert_all(checkpoint, case.ways, winner, device, boundaries_of(case))
    models = {FP32: build(checkpoint.config, {n: tensor.to(device) for n, tensor in checkpoint.tensors.items()})}
    models |= {n: held.model for n, held in converted.items()}
    memory: dict[str, dict[str, float]] = {}
    if device == "cpu" and with_memory:
        say(f"{name}: memory")
        memory = measure_memory(checkpoint, converted)
    with ExitStack() as stack:
        peers = Peers()
        if device == "cpu" and batch == 1:
            expected = prefill(models[FP32], ids).logits
            peers = find_peers(case, checkpoint, converted, expected, ids, stack, torch.get_num_threads())
        say(f"{name}: speeds")
        speeds = _speeds(case, models, peers, ids.to(device))
    return {
        **speeds,
        "memory": memory,
        "winner": None if "winner" not in case.ways else "of a search" if winner else "by rule",
        "batch": batch,
        "prompt": case.prompt,
        "decoded_after": 3 * case.prompt // 4,
        "steps": case.steps,
        "rounds": case.rounds,
        "exported": peers.exported,
        "left_out": peers.left_out,
    }


def _speeds(case: Case, models: Mapping[str, LanguageModel], peers: Peers, ids: Tensor) -> dict[str, Any]:
    """Of all ways in turn, first of reading and then of decoding, and ours over their rivals in the same rounds."""
    reading = in_turn(prefill_ways(models, ids) | peers.reading, case.rounds)
    decoding = in_turn(decode_ways(models, ids, case.steps) | peers.decoding, case.rounds)
    return {
        "prefill": summarise(reading, ids.numel()),
        "decode": summarise(decoding, ids.shape[0] * case.steps),
        "over_rivals": {"prefill": over_rivals(reading), "decode": over_rivals(decoding)},
    }


def measure_memory(checkpoint: Checkpoint, converted: Mapping[str, Converted]) -> dict[str, dict[str, float]]:
    """Of FP32 and of each converted model, by process: bytes before, loaded, at the peak; the ratio of the peaks'
    growth to FP32's, and of the whole peaks."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {FP32: _saved(checkpoint, Path(folder, FP32))}
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


def _saved(checkpoint: Checkpoint, folder: Path) -> Path:
    """A checkpoint as a folder, with its own config where it has one."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, folder / "model.safetensors")
    if checkpoint.source:
        (folder / "config.json").write_text(json.dumps(checkpoint.source), encoding="utf-8")
    return folder


def to_json(measured: Mapping[str, dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """The speedups by case and way, and everything else beside them."""

    def speedups(row: dict[str, Any]) -> dict[str, dict[str, float]]:
        ways = [way for way in (*CONVERTED, TORCHAO) if way in row["prefill"]]
        return {way: {phase: row[phase][way]["speedup"] for phase in ("prefill", "decode")} for way in ways}

    return {
        "speedup": {name: speedups(row) for name, row in measured.items()},
        "measured": dict(measured),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": cpu_flags(),
        "torch": torch.__version__,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of `_FLAGS` that this machine's processor has; none where it does not say."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    said = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    held = set(said.partition(":")[2].split())
    return [flag for flag in _FLAGS if flag in held]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(found: dict[str, Any]) -> None:
    cpu = f"{found['threads']} threads, {found['cpu_capability']} ({' '.join(found['cpu_flags'])})"
    packages = "".join(f", {name} {held}" for name, held in found["packages"].items())
    print(f"{cpu if found['device'] == 'cpu' else found['device']}, torch {found['torch']}{packages}")
    for name, row in found["measured"].items():
        prompts = f"{row['batch']} prompts" if row["batch"] > 1 else "a prompt"
        winner = "" if row["winner"] is None else f"; winner {row['winner']}"
        print(f"{name}: {prompts} of {row['prompt']} tokens, {row['steps']} steps, {row['rounds']} rounds{winner}")
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
        _print_peers(row)


def _print_peers(row: dict[str, Any]) -> None:
    for way, rivals in row["over_rivals"]["prefill"].items():
        for rival, ratio in rivals.items():
            decode = row["over_rivals"]["decode"][way][rival]
            print(f"  {way} over {rival}: prefill {ratio:.2f}×, decode {decode:.2f}×")
    for name, told in row["exported"].items():
        words = ", ".join(f"{count} {word}" for word, count in told["components"].items())
        wider = ", ".join(f"{count} {change}" for change, count in told["widened"].items())
        print(f"  {name}: {words}{f' (wider: {wider})' if wider else ''}; threads wait {told['waits']}")
        print(f"    {told['verdict']}")
    for name, why in row["left_out"].items():
        print(f"  without {name}: {why}")


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=tuple(CASES))
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run directories")
    arguments.add_argument("--rounds", type=int, help="of every case; by default as the case has them")
    arguments.add_argument("--threads", type=int, default=THREADS)
    arguments.add_argument("--no-memory", action="store_true", help="leave out the processes that measure it")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch", type=int, default=1)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    names = given.only or (tuple(CASES) if given.device == "cpu" else ON_A_GPU)
    cases = {name: replace(CASES[name], rounds=given.rounds or CASES[name].rounds) for name in names}
    measured = {
        name: measure(name, case, given.runs, given.device, given.batch, not given.no_memory)
        for name, case in cases.items()
    }  # fmt: skip
    found = to_json(measured, given.device)
    if given.json:
        print(json.dumps(found))
    else:
        _print(found)


if __name__ == "__main__":
    main()
