from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.data import Windows, cut, draw, draw_evenly, synthetic_windows
from ssm_mp.data.corpus import part_of, stdlib_documents, stdlib_files
from ssm_mp.data.windows import STRETCH
from ssm_mp.errors import DataError, MachineError


@given(st.integers(0, 300), st.integers(2, 40))
def test_cutting_keeps_the_order_and_drops_the_rest(count: int, length: int) -> None:
    pool = cut(np.arange(count), length)
    assert pool.windows(range(len(pool))).ids.flatten().tolist() == list(range(count // length * length))


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_splits_are_disjoint_and_the_same_for_the_same_seed(seed: int, a: int, b: int, c: int) -> None:
    windows = cut(np.arange(60), 2)
    parts = draw(windows, (a, b, c), seed)
    assert [len(part) for part in parts] == [a, b, c]
    firsts = torch.cat([part.ids[:, 0] for part in parts]).tolist()
    assert len(set(firsts)) == a + b + c
    again = draw(windows, (a, b, c), seed)
    assert [part.digest for part in parts] == [part.digest for part in again]


def test_more_certify_windows_leave_the_other_splits_alone() -> None:
    windows = cut(np.arange(200), 2)
    few, many = draw(windows, (5, 10, 20), 0), draw(windows, (5, 10, 60), 0)
    assert few[0].digest == many[0].digest
    assert few[1].digest == many[1].digest


def test_a_text_too_short_says_how_much_is_asked() -> None:
    with pytest.raises(DataError, match=r"book gives 3 windows of 2 tokens, 9 are asked for \(4 \+ 5\)"):
        draw(cut(np.arange(6), 2, "book"), (4, 5), 0)


def test_where_nothing_repeats_windows_are_drawn_as_ever() -> None:
    parts = draw(cut(np.arange(1000) * 7919 % 1009, 10), (5, 20, 40), 3)
    rows = torch.from_numpy(np.arange(1000) * 7919 % 1009).reshape(100, 10)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:65]
    expected = [Windows(rows[part.sort().values]).digest for part in order.split([5, 20, 40])]
    assert [part.digest for part in parts] == expected


@given(st.lists(st.integers(0, 12), min_size=8, max_size=60), st.integers(0, 99), st.booleans())
def test_equal_windows_are_drawn_once_however_a_text_repeats_itself(blocks: list[int], seed: int, begins: bool) -> None:
    contents = np.random.default_rng(0).integers(1, 50, size=(13, 6))
    pool = cut(contents[blocks].ravel(), 6 + begins, "book", 0 if begins else None)
    different = len({tuple(contents[block]) for block in blocks})
    assert len(pool) == different
    assert pool.repeated == len(blocks) - different
    third = different // 3
    parts = draw(pool, (third, different - 2 * third, third), seed)
    drawn = [tuple(row) for part in parts for row in part.ids.tolist()]
    assert len(set(drawn)) == len(drawn) == different
    assert all(not begins or row[0] == 0 for row in drawn)
    with pytest.raises(DataError, match=f"{different + 1} are asked for"):
        draw(pool, (different + 1,), seed)


def test_too_few_different_windows_say_how_many_repeat() -> None:
    pool = cut(np.tile(np.arange(8), 40), 8, "book")
    assert pool.dropped() == ("39 of 40 windows of book repeat an earlier one and are left out",)
    with pytest.raises(DataError, match=r"book gives 1 different windows of 8 tokens \(39 of 40 .* repeat"):
        draw(pool, (2, 2), 0)


def test_windows_of_another_split_are_not_drawn() -> None:
    pool = cut(np.arange(80), 8, "book")
    taken = pool.windows([2, 5])
    left = pool.without([taken])
    assert (len(left), left.elsewhere) == (8, 2)
    drawn = draw(left, (8,), 0)[0].ids[:, 0].tolist()
    assert not {16, 40} & set(drawn)
    assert left.dropped() == ("2 of 10 windows of book are windows of another split and are left out",)


def test_windows_that_begin_with_bos_hold_one_token_of_the_text_less() -> None:
    pool = cut(np.arange(10, 40), 6, "book", 3)
    assert pool.length == 6
    assert pool.windows([0, 5]).ids.tolist() == [[3, 10, 11, 12, 13, 14], [3, 35, 36, 37, 38, 39]]
    assert pool.counts(50)[[3, 10, 39, 40]].tolist() == [6, 1, 1, 0]
    assert len(pool.without([pool.windows([4])])) == 5
    made = synthetic_windows(np.ones(50, dtype=np.int64), 6, 8, 0, bos=3)
    assert made.ids[:, 0].tolist() == [3] * 6


def test_synthetic_windows_mix_uniform_frequent_and_rare_tokens() -> None:
    counts = np.arange(100, dtype=np.int64)  # token 99 is the most frequent
    ids = synthetic_windows(counts, 30, 50, seed=1).ids
    assert ids.shape == (30, 50)
    uniform, frequent, rare = ids[0::3], ids[1::3], ids[2::3]
    assert int(frequent.min()) >= 90
    assert int(rare.max()) < 50
    assert int(uniform.min()) < 10
    assert int(uniform.max()) >= 90


def test_the_library_is_split_into_disjoint_parts_without_tests() -> None:
    parts = {part: set(stdlib_files(part)) for part in ("train", "search", "certify")}
    assert not parts["train"] & parts["search"]
    assert not parts["search"] & parts["certify"]
    assert len(parts["train"]) > 10 * len(parts["search"]) > 0
    assert not any("test" in path.parts or "site-packages" in path.parts for path in parts["train"])
    assert part_of("json/decoder.py") == part_of("json/decoder.py")


def test_a_library_without_files_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="give the study a text of its own"):
        stdlib_documents("train", tmp_path)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(2, 9), st.booleans(), st.integers(0, 9))
def test_a_window_comes_from_the_document_in_which_it_begins(
    sizes: list[int], length: int, bos: bool, seed: int
) -> None:
    document = np.repeat(np.arange(len(sizes)), sizes)
    tokens = np.arange(document.size)  # each its own place
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    pool = cut(tokens, length, bos=9999 if bos else None, starts=starts)
    if not len(pool):
        return
    (drawn,) = draw(pool, [max(1, len(pool) // 2)], seed)
    assert drawn.sources is not None
    firsts = drawn.ids[:, int(bos)].numpy()
    assert drawn.sources.tolist() == document[firsts].tolist()


def test_a_text_of_one_document_has_stretches_for_sources() -> None:
    pool = cut(np.arange(2 * 100), 2)
    assert pool.sources is not None
    assert pool.sources.tolist() == [number // STRETCH for number in range(100)]
    assert pool.windows([0, STRETCH - 1, STRETCH]).sources == pytest.approx([0, 0, 1])


def test_sources_are_no_part_of_a_digest_and_stay_with_a_part() -> None:
    ids = torch.arange(12).reshape(4, 3)
    with_sources = Windows(ids, np.array([0, 0, 1, 2]))
    assert with_sources.digest == Windows(ids).digest
    part = with_sources.part(np.array([3, 1]))
    assert part.sources is not None
    assert (part.ids.tolist(), part.sources.tolist()) == ([[9, 10, 11], [3, 4, 5]], [2, 0])
    assert Windows(ids).part(np.array([1])).sources is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99), st.data())
def test_an_even_draw_takes_a_window_of_each_document_before_another_of_any(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    starts = np.cumsum([0, *sizes[:-1]]) * 4
    pool = cut(np.arange(4 * sum(sizes)), 4, starts=starts)
    count = data.draw(st.integers(1, sum(sizes)))
    drawn = draw_evenly(pool, count, seed)
    assert drawn.sources is not None
    assert pool.sources is not None
    assert len(np.unique(drawn.ids[:, 0])) == count
    taken = np.bincount(drawn.sources - pool.sources.min(), minlength=len(sizes))
    most = taken.max()
    assert all(n >= min(size, most - 1) for n, size in zip(taken, sizes, strict=True))
    more = draw_evenly(pool, sum(sizes), seed)
    assert set(drawn.ids[:, 0].tolist()) <= set(more.ids[:, 0].tolist())


def test_an_even_draw_of_more_windows_has_those_of_fewer() -> None:
    pool = cut(np.arange(400), 4, starts=np.array([0, 40, 240]))
    few, many = (set(draw_evenly(pool, count, 3).ids[:, 0].tolist()) for count in (20, 60))
    assert few < many
    assert few != set(draw_evenly(pool, 20, 4).ids[:, 0].tolist())


@given(st.lists(st.integers(0, 25), min_size=2, max_size=9), st.integers(2, 7), st.booleans())
def test_windows_within_documents_are_those_of_each_document_alone(
    sizes: list[int], length: int, begins: bool
) -> None:  # fmt: skip
    tokens = np.random.default_rng(0).permutation(sum(sizes) + 1)[: sum(sizes)]
    starts = np.cumsum([0, *sizes[:-1]])
    bos, taken = (999, length - 1) if begins else (None, length)
    pool = cut(tokens, length, "book", bos, starts, across=False)
    parts = [cut(part, length, "book", bos) for part in np.split(tokens, starts[1:])]
    assert pool.rows.tolist() == [row for part in parts for row in part.rows.tolist()]
    assert pool.sources is not None
    assert pool.sources.tolist() == [i for i, size in enumerate(sizes) for _ in range(size // taken)]
    assert pool.short == (sum(size < taken for size in sizes), len(sizes))


def test_documents_shorter_than_a_window_are_said() -> None:
    pool = cut(np.arange(9), 4, "book", None, np.array([0, 3, 8]), across=False)
    assert pool.dropped() == ("2 of 3 documents of book are shorter than a window and give none",)
    assert pool.rows.tolist() == [[3, 4, 5, 6]]
