"""Products of one row, and of many rows where the kernels take them, with each kind of stored weight, over FP32.

    python -m benchmarks.products [--json] [--only nf4 …] [--rounds 9]      # about two minutes on two cores

All ways run in turn, round after round; speedups are medians of the ratios round by round. `fp32` is the product of
these kernels with a float32 weight, `torch` is `torch.nn.functional.linear` with the same. Weights are random codes:
how fast a product is does not depend on them. Sizes are outputs × inputs: a projection of the 130m shape, its head, and
a matrix that is larger than the caches at every precision.

Dimensions: `m` rows, `n` outputs, `k` inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.inference_ways import in_turn
from ssm_mp.precisions.grouped import Grouped, GroupedTensor
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored

FP32, TORCH = "fp32", "torch"
PRECISE = ("fp16", "int8", "nf4", "int4", "nf3", "int3", "nf2")
SIZES = {"projection": (3072, 768), "head": (50280, 768), "beyond the caches": (65536, 2048)}
ROWS = (1, 512)
_VALUES = 1 << 27
"""Multiplications that are timed at once, at least."""


def random_stored(precision: str, n: int, k: int, generator: torch.Generator) -> Stored:
    """A weight `[n, k]` of random codes."""
    if precision == "fp16":
        return FloatTensor(torch.randn(n, k, generator=generator).half())
    if precision == "int8":
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        return Int8Tensor(q, torch.full((n,), 0.01, dtype=torch.float16))
    grouped = get_precision(precision)
    assert isinstance(grouped, Grouped)
    arrays = grouped.arrays((n, k), "weight")
    q = torch.randint(0, 256, arrays["q"].shape, dtype=torch.uint8, generator=generator)
    return GroupedTensor(q, torch.full(arrays["scale"].shape, 0.01, dtype=torch.float16), (n, k), grouped.book)


def ways_of(n: int, k: int, m: int, precisions: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Products of `x [m, k]` with a weight `[n, k]` by name; many rows only where the kernels take them."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
    ways: dict[str, Callable[[], object]] = {TORCH: partial(linear, x, weight)}
    held = {FP32: FloatTensor(weight)} | {name: random_stored(name, n, k, generator) for name in precisions}
    for name, stored in held.items():
        matrix = Matrix.of(stored, inputs="dynamic" if name == "int8" else "none")
        if matrix is not None and (m == 1 or matrix.takes_many):
            ways[name] = partial(_product, matrix, x)
    return ways


def _product(matrix: Matrix, x: Tensor) -> Tensor:
    return matrix.product(x)


def measure(n: int, k: int, m: int, precisions: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Of each way: microseconds of a product, and speedups over these kernels' FP32 and over torch's."""
    ways, calls = ways_of(n, k, m, precisions), max(1, _VALUES // (n * k * m))

    def timed(way: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            for _ in range(calls):
                way()
            return (time.perf_counter() - began) / calls

        return once

    seconds = in_turn({name: timed(way) for name, way in ways.items()}, rounds)

    def over(base: str, name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[base], seconds[name], strict=True))

    return {
        name: {
            "microseconds": statistics.median(seconds[name]) * 1e6,
            **{f"over_{base}": over(base, name) for base in (FP32, TORCH) if base in ways},
        }
        for name in ways
    }


def to_json(measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "products": measured,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _print(found: dict[str, Any]) -> None:
    print(f"{found['threads']} threads, {found['cpu_capability']}, torch {found['torch']}")
    for title, rows in found["products"].items():
        print(f"{title}\n              microseconds   over fp32  over torch")
        for name, row in rows.items():
            over = (f"{row[f'over_{base}']:10.2f}×" if f"over_{base}" in row else " " * 11 for base in (FP32, TORCH))
            print(f"  {name:10} {row['microseconds']:13.1f} {' '.join(over)}")


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=tuple(PRECISIONS), default=PRECISE)
    arguments.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    arguments.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=ROWS)
    arguments.add_argument("--rounds", type=int, default=9)
    given = arguments.parse_args()
    measured = {}
    for m in given.rows:
        for size in given.sizes:
            n, k = SIZES[size]
            title = f"{m} row{'s' * (m > 1)}, {size}, {n} × {k}"
            if m > 1 and size == "beyond the caches":
                continue  # many rows are not bound by memory
            measured[title] = measure(n, k, m, given.only, given.rounds)
    found = to_json(measured)
    if given.json:
        print(json.dumps(found))
    else:
        _print(found)


if __name__ == "__main__":
    main()
