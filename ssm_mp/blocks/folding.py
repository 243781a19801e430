"""Which tensors can take positive scales from one another without changing what is computed.

Dimensions: `k` inputs of a product, `s` scales that may be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor, by its canonical name, that are divided; `start`: the first of them."""

    tensor: str
    start: int = 0


@dataclass(frozen=True)
class Folding:
    """Rows of producers are divided by scales `[s]`, and columns of consumers `[n, k]` multiplied with them: exact.

    consumers: names of weights, each of which multiplies what the producers make and nothing else does.
    groups, times: a column's scale where columns outnumber scales: of so many groups of scales, each serves as many
    columns `times` over, one copy after another (values that several query heads share).
    at_most_one: producers are stored less one, which rounds what a scale above 1 would make small.
    """

    producers: tuple[Rows, ...]
    consumers: tuple[str, ...]
    size: int
    groups: int = 1
    times: int = 1
    at_most_one: bool = False

    def columns(self, scales: Tensor) -> Tensor:
        """Scales `[s]` → one a column, `[k]`."""
        return scales.view(self.groups, -1).repeat_interleave(self.times, dim=0).flatten()

    def largest(self, columns: Tensor) -> Tensor:
        """Of values a column `[k]`, the largest that shares each scale: `[s]`."""
        return columns.view(self.groups, self.times, -1).amax(dim=1).flatten()
