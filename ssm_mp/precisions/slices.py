"""Work through a tensor of any size a slice at a time, so that no whole copy of it is ever made, by all threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ssm_mp.parallel import in_parallel

_VALUES, _VALUES_ON_A_GPU = 1 << 20, 1 << 24
"""Values of a slice, about: few enough for several temporary copies in each thread, many enough to be worth a call."""

Result = TypeVar("Result")


def in_slices(function: Callable[[slice], Result], count: int, width: int, device: torch.device) -> list[Result]:
    """`function` of slices that cover `count` rows of `width` values, in order, in inference mode.

    On a CPU they are shared among as many threads as torch has, each computing with one. What one raises ends all.
    """
    most = _VALUES if device.type == "cpu" else _VALUES_ON_A_GPU
    step = max(1, most // max(1, width))
    every = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if device.type == "cpu":
        return in_parallel(function, every)
    with torch.inference_mode():
        return [function(part) for part in every]


def largest_magnitude(tensor: Tensor) -> float:
    """The largest magnitude in a tensor of any float type, 0 where it is empty; NaN where a value is NaN."""
    flat = tensor.reshape(-1)

    def largest(part: slice) -> Tensor:
        low, high = flat[part].aminmax()
        return torch.maximum(-low.float(), high.float())

    found = in_slices(largest, flat.numel(), 1, tensor.device)
    return float(torch.stack(found).max()) if found else 0.0
