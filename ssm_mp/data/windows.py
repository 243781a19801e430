"""Fixed-length windows of token ids, and the pool of different windows that a text gives.

Dimensions: `w` windows, `L` window length, `n` rows of a text, `t` tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_mp.errors import DataError

TokenIds = np.ndarray[tuple[int], np.dtype[Any]]
"""Token ids `[tokens]`, of any integer type, perhaps mapped from a file."""

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]

STRETCH = 32
"""Windows in a row that are one source where a text is a single document: about as many as a file of code has."""

_COUNTED_AT_ONCE = 1 << 22
"""Tokens that are counted at a time: what is mapped from a file is never in memory as a whole."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Fixed-length token sequences `ids [w, L]`, int64: the unit of evaluation and of statistics.

    Each window predicts its tokens 1 … L−1 from those before them. sources `[w]`, int64: which document of the text,
    or which stretch of it, each window comes from; None where nobody knows. Windows of one source resemble each other.
    """

    ids: Tensor
    sources: Ints | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def predicted(self) -> int:
        """Predicted tokens of one window."""
        return self.length - 1

    def part(self, numbers: Ints) -> Windows:
        """Windows by their numbers `[n]`, with their sources."""
        chosen = None if self.sources is None else self.sources[numbers]
        return Windows(self.ids[torch.from_numpy(numbers)], chosen)

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids and their arrangement; sources are no part of it: they change no evaluation."""
        return hashlib.sha256(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Pool:
    """The consecutive windows that a text gives, without a copy of its ids; of equal ones only the first is drawn.

    rows `[n, t]`: the text's tokens of each window; free `[n]`: whether a window may be drawn. bos: the id that
    every window begins with, before its t = L − 1 tokens of text; without it t = L. repeated, elsewhere: how many
    windows may not be drawn, since an earlier one, or one of another split, is equal. sources `[n]`: see `Windows`.
    short: how many documents of how many are too short for a window of their own.
    """

    rows: np.ndarray[tuple[int, int], np.dtype[Any]]
    free: np.ndarray[tuple[int], np.dtype[np.bool_]]
    what: str
    bos: int | None = None
    repeated: int = 0
    elsewhere: int = 0
    sources: Ints | None = None
    short: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        """How many different windows may be drawn."""
        return int(self.free.sum())

    @property
    def length(self) -> int:
        return self.rows.shape[1] + (self.bos is not None)

    def windows(self, numbers: Sequence[int] | Tensor) -> Windows:
        """Windows by their numbers."""
        chosen = np.asarray(numbers, dtype=np.int64)
        text = torch.from_numpy(self.rows[chosen].astype(np.int64))
        sources = None if self.sources is None else self.sources[chosen]
        if self.bos is None:
            return Windows(text, sources)
        return Windows(torch.cat([torch.full((text.shape[0], 1), self.bos), text], dim=1), sources)

    def without(self, taken: Iterable[Windows]) -> Pool:
        """The pool less the windows that are equal to one of `taken`."""
        known = {key for windows in taken for key in _keys(_text(windows, self.bos), self.rows.dtype)}
        same = np.fromiter((key in known for key in _keys(self.rows)), dtype=bool, count=len(self.rows))
        gone = int((same & self.free).sum())
        return replace(self, free=self.free & ~same, elsewhere=self.elsewhere + gone)

    def counts(self, vocabulary: int, *, repeats: bool = False) -> Tensor:
        """How often each token occurs in the windows that may be drawn, `[V]`; with `repeats` in all windows."""
        counted = np.ones_like(self.free) if repeats else self.free
        found = np.zeros(vocabulary, dtype=np.int64)
        step = max(1, _COUNTED_AT_ONCE // max(1, self.rows.shape[1]))
        for first in range(0, len(self.rows), step):
            part = self.rows[first : first + step][counted[first : first + step]]
            found += np.bincount(part.ravel().astype(np.int64), minlength=vocabulary)
        if self.bos is not None:
            found[self.bos] += int(counted.sum())
        return torch.from_numpy(found)

    def dropped(self) -> tuple[str, ...]:
        """What may not be drawn, in sentences; empty where all windows differ."""
        of = f"of {len(self.rows):,} windows of {self.what}"
        again = f"{self.repeated:,} {of} repeat an earlier one and are left out"
        seen = f"{self.elsewhere:,} {of} are windows of another split and are left out"
        few, documents = self.short
        short = f"{few:,} of {documents:,} documents of {self.what} are shorter than a window and give none"
        return (*([again] if self.repeated else []), *([seen] if self.elsewhere else []), *([short] if few else []))


def cut(
    tokens: TokenIds,
    length: int,
    what: str = "the text",
    bos: int | None = None,
    starts: Ints | None = None,
    *,
    across: bool = True,
) -> Pool:
    """Consecutive windows of `length` tokens, BOS included; what is left over is dropped.

    starts: where each document begins among the tokens, rising from 0; None where there is but one. across: whether
    windows may cross from one document into the next; if not, what is left over of each document is dropped, and the
    rows are a copy of the others.
    """
    taken = length - (bos is not None)
    short = (0, 0)
    if across or starts is None or starts.size < 2:
        rows = tokens[: tokens.size // taken * taken].reshape(-1, taken)
        sources = sources_of(len(rows), taken, starts)
    else:
        rows, sources = _within_documents(tokens, taken, starts)
        short = starts.size - np.unique(sources).size, starts.size
    seen: set[bytes] = set()
    free = np.ones(len(rows), dtype=bool)
    for number, key in enumerate(_keys(rows)):
        free[number] = key not in seen
        seen.add(key)
    return Pool(rows, free, what, bos, repeated=len(rows) - len(seen), sources=sources, short=short)


def _within_documents(
    tokens: TokenIds, taken: int, starts: Ints
) -> tuple[np.ndarray[tuple[int, int], np.dtype[Any]], Ints]:
    """The consecutive windows of each document `[n, taken]`, and the document of each `[n]`."""
    counts = np.diff(starts, append=tokens.size) // taken
    sources: Ints = np.repeat(np.arange(starts.size, dtype=np.int64), counts)
    place = np.arange(sources.size) - np.repeat(counts.cumsum() - counts, counts)  # of each among its document's
    begins = starts[sources] + place * taken
    if not begins.size:
        return np.zeros((0, taken), dtype=tokens.dtype), sources
    return np.lib.stride_tricks.sliding_window_view(tokens, taken)[begins], sources


def sources_of(count: int, taken: int, starts: Ints | None) -> Ints:
    """The source of each of `count` consecutive windows of `taken` tokens, `[count]`.

    It is the document in which a window begins; a text of one document is divided into stretches of `STRETCH` windows.
    """
    numbers = np.arange(count, dtype=np.int64)
    if starts is None or starts.size < 2:
        return numbers // STRETCH
    found: Ints = np.searchsorted(starts, numbers * taken, side="right").astype(np.int64) - 1
    return found


def draw(pool: Pool, counts: Sequence[int], seed: int) -> list[Windows]:
    """Disjoint random windows, `counts` of each, all different, the same for the same seed.

    Drawn at random rather than as stretches, so that each split is a fair sample of the whole text. The order is
    drawn over all windows and those that may not be drawn are passed over: the draw is a fair one of the different
    windows, and changes only where a repeated one would have been drawn. Raises DataError where there are too few.
    """
    _require(pool, counts)
    order = _shuffled(pool, seed)[: sum(counts)]
    return [pool.windows(part.sort().values) for part in order.split(list(counts))]


def draw_evenly(pool: Pool, count: int, seed: int) -> Windows:
    """Random windows, all different, from as many documents as there are: each gives one before any gives a second.

    So that a few long documents do not decide what is said of others like these. More windows are those of fewer and
    some others. Raises DataError where there are too few.
    """
    _require(pool, [count])
    order = _shuffled(pool, seed)
    if pool.sources is None:
        return pool.windows(order[:count].sort().values)
    of = torch.from_numpy(pool.sources)[order]
    by_document = of.argsort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), of[by_document].diff() != 0])
    began = torch.where(first, torch.arange(len(of)), 0).cummax(dim=0).values
    place = torch.empty_like(began)  # of each window among those of its document, in the order drawn
    place[by_document] = torch.arange(len(of)) - began
    return pool.windows(order[place.argsort(stable=True)][:count].sort().values)


def _shuffled(pool: Pool, seed: int) -> Tensor:
    """The numbers of the windows that may be drawn, in a random order that leaves the others out."""
    order = torch.randperm(len(pool.rows), generator=torch.Generator().manual_seed(seed))
    return order[torch.from_numpy(pool.free)[order]]


def _require(pool: Pool, counts: Sequence[int]) -> None:
    """Raise DataError where a pool has fewer windows than all counts together."""
    needed = sum(counts)
    if len(pool) >= needed:
        return
    different = " different" if len(pool) < len(pool.rows) else ""
    reasons = f" ({'; '.join(pool.dropped())})" if different else ""
    raise DataError(
        f"{pool.what} gives {len(pool)}{different} windows of {pool.length} tokens{reasons}, {needed} are asked "
        f"for ({' + '.join(map(str, counts))}); give a longer text or ask for fewer windows"
    )


def synthetic_windows(
    counts: TokenIds, windows: int, length: int, seed: int, bos: int | None = None
) -> Windows:  # fmt: skip
    """Made-up calibration sequences, for when no text may be used: a mix of three kinds, in turn.

    counts `[V]`: how often each token occurs, from any text, or zeros where nothing is known. A third of the
    sequences is uniform over the vocabulary, a third over the most frequent tenth, a third over the rarest half.
    """
    vocabulary = counts.size
    by_frequency = np.argsort(-counts, kind="stable")
    pools = (by_frequency, by_frequency[: max(1, vocabulary // 10)], by_frequency[vocabulary // 2 :])
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(pools[i % len(pools)], size=length) for i in range(windows)]).astype(np.int64)
    if bos is not None:
        ids[:, 0] = bos
    return Windows(torch.from_numpy(ids))


def _text(windows: Windows, bos: int | None) -> np.ndarray[Any, np.dtype[Any]]:
    """The text's tokens of windows, `[w, t]`."""
    return windows.ids.numpy()[:, 0 if bos is None else 1 :]


def _keys(rows: np.ndarray[Any, np.dtype[Any]], dtype: np.dtype[Any] | None = None) -> Iterable[bytes]:
    """128 bits of each row's content, as numbers of type `dtype`."""
    return (hashlib.blake2b(row.astype(dtype or row.dtype).tobytes(), digest_size=16).digest() for row in rows)
