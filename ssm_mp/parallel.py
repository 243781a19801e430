"""One function over many items, in as many threads as torch would use, each computing with one.

Where operators are small, or not torch's own, threads that each take a part of the work get more of a machine than
threads that share every operator.

Dimensions: `w` windows, `L` window length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

_SHARD_TOKENS, _MANY_TOKENS = 1024, 8192
"""Tokens that one thread takes at a time, so that their activations stay near its core; twice as many where there are
enough of them, so that the interpreter, which threads share, has less to do."""
_GPU_WINDOWS = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of every item, in inference mode, in the order of the items. What one of them raises ends the others.

    torch computes with one thread in each while it lasts, and is as before afterwards.
    """
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def run(item: Item) -> Result:
        return function(item)

    if threads == 1 or len(items) < 2:
        return [run(item) for item in items]
    pool = ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(run, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the products' library has one setting for all threads


def shards(values: Tensor) -> Sequence[Tensor]:
    """`[w, L, …]` in parts of whole windows, the same whatever the number of threads, so that results are the same."""
    if values.is_cuda:
        return list(values.split(_GPU_WINDOWS))
    tokens = values.shape[0] * values.shape[1]
    parts = math.ceil(tokens / (_SHARD_TOKENS * (2 if tokens >= _MANY_TOKENS else 1)))
    even = parts + parts % 2 if parts > 1 else 1  # two threads have as much to do
    return list(values.tensor_split(min(even, values.shape[0])))
