from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ssm_mp.data import Windows, cut, draw, load_tokenizer, read_tokens, synthetic_windows, tokenize
from ssm_mp.data.corpus import part_of, stdlib_documents, stdlib_files
from ssm_mp.errors import DataError, MachineError


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@given(st.integers(0, 300), st.integers(2, 40))
def test_cutting_keeps_the_order_and_drops_the_rest(count: int, length: int) -> None:
    windows = cut(np.arange(count), length)
    assert windows.ids.flatten().tolist() == list(range(count // length * length))


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_splits_are_disjoint_and_the_same_for_the_same_seed(seed: int, a: int, b: int, c: int) -> None:
    windows = Windows(torch.arange(2 * 30).reshape(30, 2))
    parts = draw(windows, (a, b, c), seed, "text")
    assert [len(part) for part in parts] == [a, b, c]
    firsts = torch.cat([part.ids[:, 0] for part in parts]).tolist()
    assert len(set(firsts)) == a + b + c
    again = draw(windows, (a, b, c), seed, "text")
    assert [part.digest for part in parts] == [part.digest for part in again]


def test_more_certify_windows_leave_the_other_splits_alone() -> None:
    windows = Windows(torch.arange(200).reshape(100, 2))
    few, many = draw(windows, (5, 10, 20), 0, "text"), draw(windows, (5, 10, 60), 0, "text")
    assert few[0].digest == many[0].digest
    assert few[1].digest == many[1].digest


def test_a_text_too_short_says_how_much_is_asked() -> None:
    with pytest.raises(DataError, match=r"book gives 3 windows of 2 tokens, 9 are asked for \(4 \+ 5\)"):
        draw(Windows(torch.zeros(3, 2, dtype=torch.long)), (4, 5), 0, "book")


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for wrong in (64, -1):
        np.save(tmp_path / "ids.npy", np.array([3, 5, wrong]))
        with pytest.raises(DataError, match=f"token id {wrong} at position 2 is outside the model's vocabulary of 64"):
            read_tokens(tmp_path / "ids.npy", None, 64)


def test_token_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros(3))
    with pytest.raises(DataError, match="integer token ids, found float64"):
        read_tokens(tmp_path / "float.npy", None, 64)
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(DataError, match="not a readable .npy"):
        read_tokens(tmp_path / "text.npy", None, 64)
    with pytest.raises(DataError, match="no text or token file"):
        read_tokens(tmp_path / "absent.txt", None, 64)


def test_a_text_goes_through_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b a b")
    word_tokenizer(["a", "b"]).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json", 64)
    assert read_tokens(tmp_path / "a.txt", tokenizer, 64).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="needs a tokenizer"):
        read_tokens(tmp_path / "a.txt", None, 64)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match="not a UTF-8 text"):
        read_tokens(tmp_path / "latin.txt", tokenizer, 64)


def test_documents_are_parted_by_the_end_of_text() -> None:
    tokenizer = word_tokenizer(["<|endoftext|>", "a", "b"])
    assert tokenize(["a b", "b"], tokenizer).tolist() == [1, 2, 0, 2, 0]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    word_tokenizer([f"w{i}" for i in range(65)]).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="65 entries, the model's vocabulary 64"):
        load_tokenizer(tmp_path / "t.json", 64)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json", 64)
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent.json", 64)


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
