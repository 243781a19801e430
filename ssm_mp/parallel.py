"""One function over many items, in as many threads as torch would use, each computing with one.

Where operators are small, or not torch's own, threads that each take a part of the work get more of a machine than
threads that share every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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
