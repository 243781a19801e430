"""What a candidate costs at the least: its bare matrix products, its bare exponentials, one pass over its logits.

Everything is run for all tokens, in whichever block size is fastest here, with inputs and outputs allocated beforehand,
by as many threads as torch has, each with half of the blocks (for two) and buffers of its own; on a GPU by one thread,
which waits for it at the end.

Dimensions: `m` tokens of a block, `k` inputs, `n` outputs of a product, `I` inner, `N` state, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ssm_mp.components import Component
from ssm_mp.data import Windows
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.parallel import in_parallel

_ROWS = {"cpu": (256, 512, 1024, 4096), "cuda": (1024, 4096, 16384)}
"""Sizes of blocks of tokens to choose from, by kind of device."""
_VALUES = {"cpu": (1 << 13, 1 << 15, 1 << 17, 1 << 20), "cuda": (1 << 20, 1 << 24)}
"""Sizes of blocks of exponentials to choose from."""
_TRIES = 5

Run = Callable[[], object]


@dataclass(frozen=True)
class Limit:
    """Seconds of the three parts for all windows."""

    products: float
    exponentials: float
    logits: float

    @property
    def seconds(self) -> float:
        """The sum: what no candidate can be evaluated in less than."""
        return self.products + self.exponentials + self.logits


@dataclass(frozen=True)
class Work:
    """The same piece of work for each thread, `size` units each time, `total` of them in all."""

    runs: tuple[Run, ...]
    size: int
    total: int
    on_gpu: bool = False

    @property
    def share(self) -> float:
        """How often a thread has to run its piece."""
        return self.total / (self.size * len(self.runs))


class SpeedLimit:
    """Measures limits of maps of one Mamba on as many windows; products are shared by all maps."""

    def __init__(
        self,
        config: MambaConfig,
        components: Sequence[Component],
        windows: Windows,
        device: torch.device = torch.device("cpu"),  # noqa: B008, it is a constant
    ) -> None:
        tokens, predicted = windows.ids.numel(), len(windows) * windows.predicted
        head = "embedding" if config.tied else "lm_head"
        products = [component for component in components if component.multiplies_inputs]
        self._shapes = {c.name: (*c.parameters[0].shape, predicted if c.name == head else tokens) for c in products}
        self._products = {
            (shape, dtype): _fastest(_ROWS, shape[2], partial(_product, device, shape[0], shape[1], dtype), device)
            for shape in set(self._shapes.values())
            for dtype in (torch.float32, torch.int8)
        }
        # the scan's decays, SiLU of both halves, softplus of the step; the log-softmax
        inside = config.d_inner * (config.d_state + 3)
        values = tokens * config.n_layers * inside + predicted * config.vocabulary
        self._exponentials = _fastest(_VALUES, values, partial(_exponential, device), device)
        self._logits = _fastest(_ROWS, predicted, partial(_pass, device, config.vocabulary), device)

    def measure(self, precision_map: Mapping[str, str]) -> Limit:
        """Run all three parts as often as this map needs them, now."""
        dtypes = {name: torch.int8 if precision_map[name] == "int8" else torch.float32 for name in self._shapes}
        products = [self._products[shape, dtypes[name]] for name, shape in self._shapes.items()]
        return Limit(_seconds(products), _seconds([self._exponentials]), _seconds([self._logits]))


def _seconds(works: Sequence[Work]) -> float:
    """Seconds for all of each, one after another, the threads side by side."""
    threads = len(works[0].runs)

    def run(thread: int) -> float:
        began = time.perf_counter()
        for work in works:
            for _ in range(round(work.share)):
                work.runs[thread]()
        if works[0].on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    if works[0].on_gpu:
        torch.cuda.synchronize()
    whole = sum(work.share for work in works) / sum(round(work.share) for work in works)
    return max(in_parallel(run, range(threads))) * whole


def _fastest(
    sizes: Mapping[str, Sequence[int]], total: int, make: Callable[[int], Run], device: torch.device
) -> Work:  # fmt: skip
    """The block size of the highest rate, each tried a few times on a part of the work."""
    on_gpu = device.type == "cuda"
    threads = 1 if on_gpu else torch.get_num_threads()
    possible = [size for size in sizes[device.type] if size * threads <= total] or [total // threads]
    works = [Work(tuple(make(size) for _ in range(threads)), size, total, on_gpu) for size in possible]
    part = 2 * threads * max(work.size for work in works)
    rates = [min(_seconds([replace(work, total=part)]) for _ in range(_TRIES)) for work in works]
    return works[rates.index(min(rates))]


def _product(device: torch.device, n: int, k: int, dtype: torch.dtype, m: int) -> Run:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
        sums = torch.empty(m, n, dtype=torch.int32, device=device)
        return lambda: torch._int_mm(a, b.t(), out=sums)
    x, w = (torch.randn(rows, k, device=device) for rows in (m, n))
    out = torch.empty(m, n, device=device)
    return lambda: torch.mm(x, w.t(), out=out)


def _exponential(device: torch.device, count: int) -> Run:
    x, out = -torch.rand(count, device=device), torch.empty(count, device=device)
    return lambda: torch.exp(x, out=out)


def _pass(device: torch.device, vocabulary: int, m: int) -> Run:
    logits, largest = torch.randn(m, vocabulary, device=device), torch.empty(m, device=device)

    def read() -> Tensor:
        return torch.amax(logits, dim=1, out=largest)

    return read
