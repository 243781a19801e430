from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.data import Windows, overlap


def windows(ids: np.ndarray) -> Windows:
    return Windows(torch.from_numpy(ids.astype(np.int64)))


@given(st.integers(0, 127), st.integers(0, 99), st.booleans())
def test_a_window_shifted_by_any_offset_is_a_near_duplicate(offset: int, seed: int, begins: bool) -> None:
    text = np.random.default_rng(seed).integers(0, 500, size=128 * 20)
    search, moved = text[:1280].reshape(10, 128), text[offset : offset + 1152].reshape(9, 128)
    fresh = text[1408:1664].reshape(2, 128)
    certify = np.concatenate([moved, fresh])
    bos = None
    if begins:
        bos = 7
        search, certify = (np.insert(ids, 0, bos, axis=1) for ids in (search, certify))
    found = overlap(windows(certify), windows(search), bos)
    assert (found.windows, found.near_duplicates, found.run) == (11, 9, 32)


def test_what_is_covered_is_counted_as_brute_force_counts_it() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 3, size=(40, 24)), rng.integers(0, 3, size=(60, 24))
    ours[:12, 3:19] = theirs[:12, 5:21]  # runs of 16 tokens in 24
    ours[12:20, 3:14] = theirs[12:20, 5:16]  # of 11: fewer than half
    run = 12
    known = {tuple(row[i : i + run]) for row in theirs.tolist() for i in range(24 - run + 1)}
    expected = 0
    for row in ours.tolist():
        covered = {j for i in range(24 - run + 1) if tuple(row[i : i + run]) in known for j in range(i, i + run)}
        expected += len(covered) > 12
    found = overlap(windows(ours), windows(theirs))
    assert (found.near_duplicates, found.run) == (expected, run)
    assert 12 <= expected < 20
    assert f"{expected} of 40 certify windows ({expected / 40:.1%})" in found.sentence()
