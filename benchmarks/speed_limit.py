"""What a candidate costs at the least: its bare matrix products, its bare exponentials, one pass over its logits.

Everything is run for all tokens, in whichever block size is fastest here, with inputs and outputs allocated beforehand,
by as many threads as torch has, each with half of the blocks (for two) and buffers of its own.

Dimensions: `m` tokens of a block, `k` inputs, `n` outputs of a product, `I` inner, `N` state, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssm_mp.components import Component
from ssm_mp.data import Windows
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.parallel import in_parallel

_ROWS = (256, 512, 1024, 4096)
"""Sizes of blocks of tokens to choose from."""
_VALUES = (1 << 13, 1 << 15, 1 << 17, 1 << 20)
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

    @property
    def share(self) -> float:
        """How often a thread has to run its piece."""
        return self.total / (self.size * len(self.runs))


class SpeedLimit:
    """Measures limits of maps of one Mamba on as many windows; products are shared by all maps."""

    def __init__(self, config: MambaConfig, components: Sequence[Component], windows: Windows) -> None:
        tokens, predicted = windows.ids.numel(), len(windows) * windows.predicted
        head = "embedding" if config.tied else "lm_head"
        products = [component for component in components if component.multiplies_inputs]
        self._shapes = {c.name: (*c.parameters[0].shape, predicted if c.name == head else tokens) for c in products}
        self._products = {
            (shape, dtype): _fastest(_ROWS, shape[2], partial(_product, shape[0], shape[1], dtype))
            for shape in set(self._shapes.values())
            for dtype in (torch.float32, torch.int8)
        }
        # the scan's decays, SiLU of both halves, softplus of the step; the log-softmax
        inside = config.d_inner * (config.d_state + 3)
        values = tokens * config.n_layers * inside + predicted * config.vocabulary
        self._exponentials = _fastest(_VALUES, values, _exponential)
        self._logits = _fastest(_ROWS, predicted, partial(_pass, config.vocabulary))

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
        return time.perf_counter() - began

    whole = sum(work.share for work in works) / sum(round(work.share) for work in works)
    return max(in_parallel(run, range(threads))) * whole


def _fastest(sizes: Sequence[int], total: int, make: Callable[[int], Run]) -> Work:
    """The block size of the highest rate, each tried a few times on a part of the work."""
    threads = torch.get_num_threads()
    works = [Work(tuple(make(size) for _ in range(threads)), size, total) for size in sizes if size * threads <= total]
    part = 2 * threads * max(work.size for work in works)
    rates = [min(_seconds([Work(work.runs, work.size, part)]) for _ in range(_TRIES)) for work in works]
    return works[rates.index(min(rates))]


def _product(n: int, k: int, dtype: torch.dtype, m: int) -> Run:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        sums = torch.empty(m, n, dtype=torch.int32)
        return lambda: torch._int_mm(a, b.t(), out=sums)
    x, w, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
    return lambda: torch.mm(x, w.t(), out=out)


def _exponential(count: int) -> Run:
    x, out = -torch.rand(count), torch.empty(count)
    return lambda: torch.exp(x, out=out)


def _pass(vocabulary: int, m: int) -> Run:
    logits, largest = torch.randn(m, vocabulary), torch.empty(m)

    def read() -> Tensor:
        return torch.amax(logits, dim=1, out=largest)

    return read
