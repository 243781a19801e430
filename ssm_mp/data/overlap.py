"""Near duplicates: how much of some windows stands, shifted by any offset, in others too.

Dimensions: `w` windows, `L` window length, `n` tokens of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_mp.data.windows import Windows

RUN = 32
"""Tokens in a row that no two texts share by chance; in windows shorter than twice that, half a window."""

_Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Overlap:
    """How many of `windows` have more than half of their tokens in runs of `run` tokens that other windows hold too."""

    windows: int
    near_duplicates: int
    run: int

    def sentence(self) -> str:
        """For a note or a report."""
        share = self.near_duplicates / max(1, self.windows)
        return (
            f"{self.near_duplicates} of {self.windows} certify windows ({share:.1%}) are near duplicates of search "
            f"windows: more than half of their tokens stand in runs of {self.run} tokens that search windows hold too"
        )


def overlap(windows: Windows, others: Windows, bos: int | None = None) -> Overlap:
    """How many of `windows` are near duplicates of what stands in `others`. BOS is no part of a run."""
    first = 0 if bos is None else 1
    run = min(RUN, max(1, (windows.length - first) // 2))
    found, known = (_runs(each.ids.numpy()[:, first:], run) for each in (windows, others))
    held = np.isin(found, np.unique(known))  # [w, L − run + 1], at each run's first token
    # a token is covered where one of the runs that it stands in is held
    edges = np.zeros((len(windows), windows.length - first + 1), dtype=np.int64)
    edges[:, : held.shape[1]] += held
    edges[:, run : run + held.shape[1]] -= held
    covered = (edges.cumsum(axis=1)[:, :-1] > 0).mean(axis=1)
    return Overlap(len(windows), int((covered > 0.5).sum()), run)


def _runs(ids: np.ndarray[Any, np.dtype[np.int64]], run: int) -> _Hashes:
    """Polynomial hashes modulo 2⁶⁴ of all runs of `ids [w, L]`: `[w, L − run + 1]`."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    count = ids.shape[1] - run + 1
    hashes = np.zeros((ids.shape[0], count), dtype=np.uint64)
    for offset in range(run):
        hashes = hashes * np.uint64(0xD1342543DE82EF95) + mixed[:, offset : offset + count]
    return hashes
