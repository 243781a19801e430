from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ssm_mp.data import TokenIds, load_tokenizer, read_documents, read_tokens
from ssm_mp.data.token_files import KEPT_FROM, kept
from ssm_mp.errors import DataError


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


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


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    word_tokenizer(["a", "b", "</s>"]).save(str(tmp_path / "t.json"))
    return load_tokenizer(tmp_path / "t.json", 64)


def test_json_lines_give_their_text_fields_each_with_the_end_of_text(tmp_path: Path, words: Tokenizer) -> None:
    lines = '{"text": "b a", "id": 1}\n\n{"id": 2, "text": "b"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps([{"text": "b a"}, "b"], indent=1))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("a.jsonl", "a.json", "b.json", "a.jsonl.gz"):
        assert read_tokens(tmp_path / name, words, 64).tolist() == [1, 0, 2, 1, 2], name
    (tmp_path / "other.jsonl").write_text('{"content": "a b"}')
    assert read_tokens(tmp_path / "other.jsonl", words, 64, "content").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "a"}', r"line 2: no field 'text'; there are 'content'.*text_field"),
        ('{"text": null}', r"line 2: the field 'text' is NoneType"),
        ('{"text": "a"', r"line 2: not JSON"),
        ('"a"', r"line 2: expected an object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, words: Tokenizer, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_tokens(tmp_path / "a.jsonl", words, 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na", "a table.*read_csv"),
        ("a.data", b"PAR1", "a Parquet table.*end in .parquet"),
        ("a.parquet", b"PAR1", "not a readable Parquet table"),
        ("a.zip", b"PK\x03\x04", "an archive"),
        ("a.txt.gz", gzip.compress(b"a b", mtime=0), "compressed.*gunzip"),
        ("a.txt", gzip.compress(b"a b", mtime=0), "compressed.*gunzip"),
        ("a.txt", b"%PDF-1.7", "a PDF"),
        ("a.pdf", b"a b", "a PDF"),
        ("ids.bin", b"\1\0\2\0", "numpy.fromfile"),
        ("a", b"a\0b\0", "binary"),
        ("a.txt", "a b".encode("utf-16"), "the mark of UTF-16.*iconv -f UTF-16"),
        ("a.txt", b"a b\nb \xe9", "byte 0xe9 at position 6 .line 2.*iconv -f WINDOWS-1252"),
        ("a.jsonl", b'{"text": "\xe9"}', "byte 0xe9 at position 10"),
    ],
)
def test_what_is_no_utf_8_text_is_refused_by_its_kind(
    tmp_path: Path, words: Tokenizer, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_tokens(tmp_path / name, words, 64)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}', encoding="utf-8-sig")
    assert read_tokens(tmp_path / "a.txt", words, 64).tolist() == [0, 1]
    assert read_tokens(tmp_path / "a.jsonl", words, 64).tolist() == [0, 1]


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(DataError, match=r"token id 1 \('b'\) at position 1 is outside the model's vocabulary of 1"):
        read_tokens(tmp_path / "a.txt", words, 1)


@given(st.integers(0, 400), st.sampled_from([np.uint16, np.uint32, np.int64]), st.data())
def test_kept_ids_are_those_that_were_written_or_made_again(
    tmp_path_factory: pytest.TempPathFactory, count: int, kind: type, data: st.DataObject
) -> None:
    path, said = tmp_path_factory.mktemp("kept") / "tokens.npy", list[str]()
    ids: TokenIds = np.arange(count, dtype=kind)
    assert kept(path, lambda: ids, said.append).tolist() == ids.tolist()
    again = kept(path, lambda: ids[:0], said.append)
    assert again.tolist() == ids.tolist()
    assert (again.dtype, len(said)) == (ids.dtype, 1)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    else:
        path.write_bytes(content[:at])
    other = ids[: count // 2]
    assert kept(path, lambda: other, said.append).tolist() == other.tolist()
    assert kept(path, lambda: ids[:0], said.append).tolist() == other.tolist()


def test_a_long_text_is_encoded_once_for_all_who_share_a_folder(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b b " * (KEPT_FROM // 6 + 1))
    cache, said = tmp_path / "run", list[str]()
    ids = read_tokens(tmp_path / "a.txt", words, 64, cache=cache, say=said.append)
    (tokens,) = cache.iterdir()
    before = tokens.stat().st_mtime_ns
    assert read_tokens(tmp_path / "a.txt", words, 64, cache=cache, say=said.append).tolist() == ids.tolist()
    assert (tokens.stat().st_mtime_ns, len(said)) == (before, 1)
    (tmp_path / "a.txt").write_text("b b b " * (KEPT_FROM // 6 + 1))
    assert read_tokens(tmp_path / "a.txt", words, 64, cache=cache)[:3].tolist() == [1, 1, 1]
    other = word_tokenizer(["b", "a", "</s>"])
    assert read_tokens(tmp_path / "a.txt", other, 64, cache=cache)[:3].tolist() == [0, 0, 0]
    (tmp_path / "blocked").write_text("")  # no folder: the work goes on, and it is said
    found = read_tokens(tmp_path / "a.txt", words, 64, cache=tmp_path / "blocked", say=said.append)
    assert found[:3].tolist() == [1, 1, 1]
    assert "cannot be kept" in said[-1]


def test_where_documents_begin_is_kept_with_the_ids_of_a_long_text(tmp_path: Path, words: Tokenizer) -> None:
    line = json.dumps({"text": "a b " * 5000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * (KEPT_FROM // len(line) + 1))
    cache = tmp_path / "run"
    first = read_documents(tmp_path / "a.jsonl", words, 64, cache=cache)
    again = read_documents(tmp_path / "a.jsonl", words, 64, cache=cache)
    without = read_documents(tmp_path / "a.jsonl", words, 64)
    assert first.starts.tolist() == again.starts.tolist() == without.starts.tolist()
    assert np.unique(np.diff(first.starts)).size == 1
    assert first.starts.size > 20
    for kept_file in cache.iterdir():
        if kept_file.name.startswith("documents-"):
            kept_file.unlink()  # as a former version left it
    assert read_documents(tmp_path / "a.jsonl", words, 64, cache=cache).starts.tolist() == first.starts.tolist()


def test_several_files_are_one_text_each_a_document_with_the_end_of_text(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{"text": "b b"}\n', encoding="utf-8")
    found = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], words, 64)
    assert found.ids.tolist() == [0, 1, 2, 1, 2, 1, 1, 2]
    assert found.starts.tolist() == [0, 3, 5]


def test_a_list_of_one_file_is_that_file(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b", encoding="utf-8")
    alone, listed = (read_documents(text, words, 64) for text in (tmp_path / "a.txt", [tmp_path / "a.txt"]))
    assert listed.ids.tolist() == alone.ids.tolist() == [0, 1]
    assert listed.starts.tolist() == alone.starts.tolist() == [0]


def test_kept_ids_of_several_files_depend_on_each_of_them(tmp_path: Path, words: Tokenizer) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("a " * (KEPT_FROM // 2), encoding="utf-8")
    for text in ("b", "b b"):
        paths[1].write_text(text, encoding="utf-8")
        fresh = read_documents(paths, words, 64)
        for _ in range(2):
            held = read_documents(paths, words, 64, cache=tmp_path / "run")
            assert held.ids.tolist() == fresh.ids.tolist()
            assert held.starts.tolist() == fresh.starts.tolist()


def test_token_files_are_put_together_but_not_with_texts(tmp_path: Path, words: Tokenizer) -> None:
    for name, ids in (("a.npy", [1, 2]), ("b.npy", [3])):
        np.save(tmp_path / name, np.array(ids))
    (tmp_path / "c.txt").write_text("a", encoding="utf-8")
    found = read_documents([tmp_path / "a.npy", tmp_path / "b.npy"], None, 64)
    assert (found.ids.tolist(), found.starts.tolist()) == ([1, 2, 3], [0, 2])
    with pytest.raises(DataError, match=r"a\.npy holds token ids and .*c\.txt is a text"):
        read_documents([tmp_path / "a.npy", tmp_path / "c.txt"], words, 64)


@pytest.mark.parametrize("text", ["a b " * 400_000, "a", ""])
def test_every_step_of_encoding_is_told_once(tmp_path: Path, words: Tokenizer, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    asked: list[int] = []
    told: list[str] = []

    def steps(stage: str, total: int) -> Callable[[], None]:
        asked.append(total)
        return lambda: told.append(stage)

    found = read_documents(tmp_path / "a.txt", words, 64, steps=steps)
    assert found.ids.tolist() == read_tokens(tmp_path / "a.txt", words, 64).tolist()
    assert [len(told)] == asked
    assert (len(told) > 1) == (len(text) > 1 << 18)
