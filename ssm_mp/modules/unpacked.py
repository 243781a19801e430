"""Small tensors as they are computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ssm_mp.precisions.stored import Stored


@runtime_checkable
class Remembering(Protocol):
    """A module that keeps what it made of tensors, and with it those tensors themselves, until it is told otherwise."""

    def forget(self) -> None:
        """Let go of that; it is made again when it is needed."""


class Unpacked:
    """A small tensor as it is computed with, unpacked once: what does not change need not be unpacked at every call."""

    def __init__(self, make: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """`make`: of the float32 tensor, what is computed with."""
        self._make = make
        self._held: tuple[object, Tensor, object] | None = None

    def __call__(self, stored: Stored) -> Tensor:
        """What is computed with in place of `stored`."""
        if stored.is_trained:
            return self._make(stored.tensor())
        stamp = stored.stamp
        if self._held is None or self._held[0] != stamp:
            # gradients of others may pass by it later, which they cannot by a tensor of inference mode
            with torch.inference_mode(mode=False):
                made = self._make(stored.tensor())
            # what was unpacked is held too: another tensor in its place would have its stamp
            self._held = (stamp, made, stored.arrays())
        return self._held[1]
