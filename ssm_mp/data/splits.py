"""A study's disjoint windows, and what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssm_mp.data.overlap import Overlap
from ssm_mp.data.windows import Windows


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint windows: activation ranges, probes and trials, and the winner's certificate. No two are equal.

    token_counts: how often each token occurs in the calibration text, `[V]`. bos: the id that every window begins
    with, if any. dropped: sentences on windows that repeat and were left out. overlap: how much of the certify
    windows stands in the search windows too.
    """

    calibration: Windows
    search: Windows
    certify: Windows
    token_counts: Tensor
    bos: int | None = None
    dropped: tuple[str, ...] = ()
    overlap: Overlap | None = None

    def described(self) -> list[str]:
        """What a report says of the windows, a sentence each."""
        parts = f"{len(self.calibration)} calibration, {len(self.search)} search and {len(self.certify)} certify"
        bos = (
            "no token is put before them"
            if self.bos is None
            else f"each begins with token {self.bos} (BOS), which is never predicted, and goes on with "
            f"{self.search.length - 1} tokens of the text"
        )
        overlap = [] if self.overlap is None else [self.overlap.sentence()]
        return [f"{parts} windows of {self.search.length} tokens; {bos}", *self.dropped, *overlap]
