"""Where a block stands in the model and in the file, and what most of its tensors look like there.

Dimensions: `n` outputs, `k` inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ssm_mp.config import Part
from ssm_mp.runtimes.gguf.tensors import Entry, Rows, entry, matrix, zeros


@dataclass(frozen=True)
class Place:
    """Where a block stands.

    at: in the model, `layers.3.mamba`. blk: in the file, `blk.3`. neighbours: whether rotary positions turn pairs of
    neighbours there, where ours turn halves. shared: whether it is the feed-forward beside experts. eps: of all norms
    in the file.
    """

    at: str
    blk: str
    part: Part
    neighbours: bool = False
    shared: bool = False
    eps: float = 1e-5

    def name(self, leaf: str) -> str:
        """A component's name in the model."""
        return self.part.block.component(self.at, leaf)

    def linear(
        self, name: str, leaf: str, n: int, k: int, *, factor: float = 1.0, biased: bool = False, after: float = 1.0,
        order: Sequence[int] | None = None,
    ) -> Iterator[Entry]:  # fmt: skip
        """A projection `[n, k]`. factor: of its weight; after: of its bias; order: of its rows."""
        at = self.name(leaf)
        yield matrix(f"{self.blk}.{name}.weight", (n, k), Rows(f"{at}.weight", order, factor))
        if biased:
            rows = (Rows(f"{at}.bias", order, after),)
            yield Entry(f"{self.blk}.{name}.bias", (n,), rows)

    def convolution(self, name: str, leaf: str, channels: int, kernel: int, biased: bool) -> Iterator[Entry]:
        """A depthwise convolution, whose bias llama.cpp always adds."""
        at, there = self.name(leaf), f"{self.blk}.{name}"
        yield entry(f"{there}.weight", (channels, kernel), f"{at}.weight")
        yield entry(f"{there}.bias", (channels,), f"{at}.bias") if biased else zeros(f"{there}.bias", channels, at)
