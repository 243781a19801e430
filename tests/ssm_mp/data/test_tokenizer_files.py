from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from ssm_mp.data import bos_id, find_tokenizer, load_tokenizer, prompt_ids
from ssm_mp.data.corpus import stdlib_documents
from ssm_mp.errors import DataError

REFERENCE = Path("studies/reference/tokenizer.json")
SENTENCEPIECE = Path(__file__).parent / "sentencepiece"


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    word_tokenizer([f"w{i}" for i in range(65)]).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="65 entries, the model's vocabulary 64"):
        load_tokenizer(tmp_path / "t.json", 64)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json", 64)
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent.json", 64)


@given(st.text())
def test_bytes_are_their_own_ids(text: str) -> None:
    tokenizer = load_tokenizer("bytes", 256)
    ids = tokenizer.encode(text).ids
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_added_tokens_beyond_the_vocabulary_are_noted_and_others_refused(tmp_path: Path) -> None:
    tokenizer, said = word_tokenizer(["a", "b"]), list[str]()
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens([AddedToken("tool", normalized=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json", 2, said.append)
    assert "2 added tokens" in said[0]
    assert "'<|im_start|>', 'tool'" in said[0]
    assert prompt_ids(loaded, "b a", 2) == [1, 0]
    with pytest.raises(DataError, match=r"the prompt: token id 3 \('tool'\) at position 1"):
        prompt_ids(loaded, "b tool", 2)
    with pytest.raises(DataError, match="'b' has no row"):
        load_tokenizer(tmp_path / "t.json", 1)


def test_two_files_of_a_byte_level_vocabulary_are_the_tokenizer_that_one_file_is(tmp_path: Path) -> None:
    whole = Tokenizer.from_file(str(REFERENCE))
    model = json.loads(whole.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        parts = load_tokenizer(path, 8000)
        text = "".join(stdlib_documents("certify")[:8]) + "\n\té日<|endoftext|> it's"
        assert parts.encode(text).ids == whole.encode(text).ids
        assert parts.decode(parts.encode(text).ids, skip_special_tokens=False) == text
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 8000}')
    said: list[str] = []
    assert load_tokenizer(tmp_path, 8000, said.append).token_to_id("<|im_end|>") == 8000
    assert "'<|im_end|>'" in said[0]
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(DataError, match=r"merges.txt, line 1: expected two symbols"):
        load_tokenizer(tmp_path, 8001)
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "b": 1}')
    with pytest.raises(DataError, match="not the byte-level vocabulary of GPT-2"):
        load_tokenizer(tmp_path, 8000)


CHARACTERS = {"<unk>": 0, "a": 1, "b": 2, " ": 3, "\n": 4, "A": 5}


@pytest.mark.parametrize(
    "content",
    [
        CHARACTERS, {"token2id": CHARACTERS}, {"token_to_id": CHARACTERS, "size": 6}, {"stoi": CHARACTERS},
        {"itos": list(CHARACTERS)}, {"id_to_token": {str(i): c for c, i in CHARACTERS.items()}}, list(CHARACTERS),
    ],
)  # fmt: skip
def test_a_table_of_single_characters_reads_characters(tmp_path: Path, content: object) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path, 6)
    assert tokenizer.encode("ab\n Az").ids == [1, 2, 4, 3, 5, 0]
    assert tokenizer.decode([1, 2, 4, 3, 5]) == "ab\n A"


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["[UNK]", "The", "end.", "x"], "The  end.\nx end", [1, 2, 3, 0]),
        (["<unk>", "the", "end", ".", ","], "The end.., x", [1, 2, 3, 3, 4, 0]),
        (["<unk>", "the", "end", "...", "."], "the end... end.", [1, 2, 3, 2, 4]),
        (["<unk>", "the", "<eos>"], "the<eos>the", [1, 2, 1]),
    ],
)
def test_a_table_of_words_reads_words(tmp_path: Path, words: list[str], text: str, expected: list[int]) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    said: list[str] = []
    assert load_tokenizer(tmp_path / "vocab.txt", 9, said.append).encode(text).ids == expected
    assert "is taken for a vocabulary of" in said[0]


def test_a_word_that_a_vocabulary_lacks_is_an_error_where_it_has_no_entry_for_it(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text('{"token2id": {"one": 0, "two": 1}}')
    tokenizer = load_tokenizer(tmp_path / "v.json", 2)
    assert tokenizer.encode("two one").ids == [1, 0]
    with pytest.raises(DataError, match=r"the prompt: it holds words or characters that .* 2 entries lack"):
        prompt_ids(tokenizer, "two three", 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tiktoken", b"IQ== 0", "not a kind of tokenizer that is read.*ids.npy"),
        ("t.pkl", b"\x80\x04", "not a kind of tokenizer that is read.*ids.npy"),
        ("t.json", b'{"a": "b"}', "nor a vocabulary.*ids.npy"),
        ("t.json", b"{}", "nor a vocabulary.*ids.npy"),
        ("t.json", b"[1, 2", "not JSON"),
        ("t.json", b'{"a": 0, "b": 0}', "two tokens share an id"),
        ("vocab.txt", b"[UNK]\nplay\n##ing", "WordPiece.*tokenizer.json"),
        ("vocab.txt", b"a\nb\na", "1 lines repeat"),
        ("t.model", b"\xff\xff", "not a SentencePiece model.*npy"),
        ("t.model", b"", "not a SentencePiece model.*npy"),
    ],
)
def test_other_files_are_refused_with_a_way_out(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name, 8000)


def test_the_first_of_the_known_names_in_a_folder_counts(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(DataError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path, 9)
    for name in ("vocab.txt", "vocab.json", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("")
        assert find_tokenizer(tmp_path) == tmp_path / name


@pytest.mark.parametrize("name", ["fallback", "stripping"])
def test_a_sentencepiece_model_gives_sentencepieces_own_ids(name: str) -> None:
    tokenizer = load_tokenizer(SENTENCEPIECE / f"{name}.model", 500)
    expected = json.loads((SENTENCEPIECE / f"{name}.json").read_text(encoding="utf-8"))
    assert len(expected) > 100
    for text, ids in expected:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_a_sentencepiece_model_decodes_what_it_encodes() -> None:
    tokenizer = load_tokenizer(SENTENCEPIECE / "fallback.model", 500)
    for text in ("def  main(é):\n\treturn 日", " a", "x <s> y"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_sentencepiece_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of the kind unigram.*tokenizer.json.*npy"):
        load_tokenizer(SENTENCEPIECE / "unigram.model", 500)
    normalising = b"\x1a\x03\x12\x01x"  # the field of the normaliser, with a table in it
    (tmp_path / "t.model").write_bytes((SENTENCEPIECE / "stripping.model").read_bytes() + normalising)
    with pytest.raises(DataError, match="normalises its text.*tokenizer.json.*npy"):
        load_tokenizer(tmp_path / "t.model", 500)


@given(st.data())
def test_a_damaged_sentencepiece_model_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((SENTENCEPIECE / "fallback.model").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "t.model"
    path.write_bytes(content[: data.draw(st.integers(at, len(content)))])
    with contextlib.suppress(DataError):  # any other failure is one
        load_tokenizer(path, 100_000)


def test_what_begins_a_text_is_found_by_what_is_said_or_by_name(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["a", "b", "<|endoftext|>", "<s>", "<start>"])
    assert bos_id(False, None, None, 5) is None
    assert bos_id(0, None, None, 5) == 0
    assert bos_id(True, tokenizer, None, 5) == 3
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<start>"}}')
    assert bos_id(True, tokenizer, tmp_path, 5) == 4
    assert bos_id(True, load_tokenizer(SENTENCEPIECE / "fallback.model", 500), None, 500) == 1
    for wrong, given_, message in (
        (True, None, "token ids have no tokenizer"), (True, word_tokenizer(["a"]), "no token of a known name"),
        (5, tokenizer, "token id 5 is outside the model's vocabulary of 5"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            bos_id(wrong, given_, None, 5)
