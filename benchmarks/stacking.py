"""Candidates per second against the number evaluated in one pass, and the limit that the machine sets.

    python -m benchmarks.stacking [--json] [--device cuda] [--maps 8] [--most 256]     # about three minutes on a CPU

Maps are random ones of the reference study with fp16, int8 and int4; all are evaluated on all search windows, for each
size of stack in turn, and one after another by `evaluate` in the same run. The limit of a stack is the time of its bare
matrix products, each at the rate measured for its shape and type, plus the least bytes that everything between them
reads and writes, at the bandwidth measured for copies. Only work that the stack does is counted: maps that agree up to
some layer are one there.

Dimensions: `m` tokens, `k` inputs, `n` outputs of a product, `d` model, `I` inner, `N` state, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.components import Component
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.evaluation.stack import evaluate_stacked, in_order, make_stack
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.precision_map import PrecisionMap

STUDY = Path("studies/reference.toml")
_PRECISIONS = 'precision.choices=["fp16", "int8", "int4"]'
_ROUNDS = 2
_TRIES = 5
_NEAR = 1 << 19
"""Numbers of 4 bytes that fit into a CPU core's own memory: 2 MiB."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, all of it done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True, eq=False)
class Machine:
    """What one device does at best, measured."""

    device: torch.device

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cache  # noqa: B019, lives as long as the benchmark
    def token_seconds(self, n: int, k: int, dtype: torch.dtype) -> float:
        """One token's share of a product `[m, k] · [k, n]`; on a CPU of so few that they stay near its core."""
        m = 16384 if self._on_gpu else max(32, min(1024, _NEAR // n))
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, (rows, k), dtype=dtype, device=self.device) for rows in (m, n))
            return self._best(lambda: torch._int_mm(a, b.t())) / m
        x, w = (torch.randn(rows, k, device=self.device, dtype=dtype) for rows in (m, n))
        return self._best(lambda: torch.mm(x, w.t())) / m

    @cache  # noqa: B019, lives as long as the benchmark
    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes; on a CPU within the memory near its core."""
        source = torch.zeros((1 << 28) if self._on_gpu else _NEAR // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds, least of several tries, each long enough to be measured."""
        work()
        once = seconds(work, self.device)
        repeats = max(1, round(0.01 / max(once, 1e-7)))
        return min(seconds(lambda: [work() for _ in range(repeats)], self.device) for _ in range(_TRIES)) / repeats


@dataclass(frozen=True, eq=False)
class Limits:
    """The least time of a stack."""

    workspace: Workspace
    machine: Machine

    def seconds(self, maps: Sequence[PrecisionMap]) -> float:
        """Of maps in one pass over all search windows."""
        workspace, config = self.workspace, self.workspace.checkpoint.config
        assert isinstance(config, MambaConfig), "the limit is that of the family `mamba`"
        windows = workspace.splits.search
        tokens, predicted = windows.ids.numel(), len(windows) * windows.predicted
        ordered = in_order(workspace.converter.components, maps)
        stack = make_stack(workspace.converter, ordered)
        held, moved, total = [one.to_json() for one in ordered], 0, 0.0
        components = workspace.converter.components
        for i in range(config.n_layers):
            inside = [c for c in components if c.stage <= i + 1]
            distinct = {tuple(one[c.name] for c in inside): one for one in held}
            assert len(distinct) == stack.stages[i].parents.shape[0]
            total += tokens * sum(self._products([c for c in inside if c.layer == i], one) for one in distinct.values())
            # norm and residual; convolution; scan, which reads a, dt, z, B and C
            moved += len(distinct) * tokens * (5 * config.d_model + 6 * config.d_inner + 2 * config.d_state)
        head = [c for c in components if c.kind == ("embedding" if config.tied else "lm_head")]
        total += predicted * sum(self._products(head, one) for one in held)
        moved += len(held) * predicted * 2 * config.vocabulary  # logits, written and read
        return total + 4 * moved / self.machine.bandwidth()

    def _products(self, components: Sequence[Component], held: Mapping[str, str]) -> float:
        """Seconds a token of the products among some components."""
        return sum(
            self.machine.token_seconds(*c.parameters[0].shape, self._dtype(c, held[c.name]))
            for c in components
            if c.multiplies_inputs
        )

    def _dtype(self, component: Component, precision: str) -> torch.dtype:
        """What a component multiplies."""
        if component.input_scheme(precision, self.workspace.spec.precision.activations) != "none":
            return torch.int8
        halves = precision == "fp16" and self.machine.device.type == "cuda"
        return torch.float16 if halves else torch.float32


def random_maps(workspace: Workspace, count: int) -> list[PrecisionMap]:
    """Different maps of the search space."""
    rng, space = random.Random(0), workspace.space
    found: set[PrecisionMap] = set()
    while len(found) < count:
        found.add(space.map({c.name: rng.choice(space.choices[c.name]) for c in space.free}))
    return in_order(workspace.converter.components, found)


def measure(study: Path, device: str, count: int, most: int) -> dict[str, Any]:
    """Candidates per second by number stacked, and what fraction of the limit that is."""
    overrides = [_PRECISIONS, f'search.device="{device}"', "data.certify_windows=2"]
    workspace = open_workspace(load_spec(study, overrides))
    machine, maps, windows = Machine(torch.device(device)), random_maps(workspace, count), workspace.splits.search
    converter = workspace.converter
    expected = [evaluate(converter.convert(one), windows) for one in maps]  # every module is made by this, too
    sizes = [size for size in (1 << i for i in range(20)) if size <= min(most, count)]
    best = dict.fromkeys([0, *sizes], float("inf"))
    for _ in range(_ROUNDS):
        alone = seconds(lambda: [evaluate(converter.convert(one), windows) for one in maps], machine.device)
        best[0] = min(best[0], alone)
        for size in sizes:
            taken = seconds(partial(evaluate_stacked, converter, maps, windows, most=size), machine.device)
            best[size] = min(best[size], taken)
    found = evaluate_stacked(converter, maps, windows, most=sizes[-1])
    worst = 0.0
    for ours, alone_ in zip(found, expected, strict=True):
        assert isinstance(ours, Evaluation), ours
        worst = max(worst, float(abs(ours.nll - alone_.nll).max()) / windows.predicted)
    limits = Limits(workspace, machine)
    least = {s: sum(limits.seconds(maps[i : i + s]) for i in range(0, count, s)) for s in sizes}
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "maps": count,
        "windows": len(windows),
        "bandwidth_gb_s": machine.bandwidth() / 1e9,
        "alone": count / best[0],
        "stacked": {
            str(s): {"candidates_per_second": count / best[s], "limit_fraction": least[s] / best[s]} for s in sizes
        },
        "largest_difference_nats": worst,
    }


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--study", type=Path, default=STUDY)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--threads", type=int, default=1, help="of a CPU; a worker's share of it is one")
    arguments.add_argument("--maps", type=int, default=8)
    arguments.add_argument("--most", type=int, default=256)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.study, given.device, given.maps, given.most)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{found['device']}: {found['maps']} maps, {found['windows']} windows, {found['bandwidth_gb_s']:.0f} GB/s")
    print(f"evaluate, one at a time: {found['alone']:.2f} candidates/s")
    for size, row in found["stacked"].items():
        rate, fraction = row["candidates_per_second"], row["limit_fraction"]
        print(f"{size:>5} in one pass: {rate:7.2f} candidates/s, {fraction:.2f} of the limit")
    print(f"largest difference from one at a time: {found['largest_difference_nats']:.1e} nats a token")


if __name__ == "__main__":
    main()
