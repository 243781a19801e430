from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ssm_mp.data import encode, encoding, tokenize
from ssm_mp.data.corpus import stdlib_documents
from ssm_mp.data.seams import word_pattern

REFERENCE = Path("studies/reference/tokenizer.json")
TEXT = "\n".join(stdlib_documents("search"))[:300_000]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT[:60_000]], trainer)
    return tokenizer


@functools.cache
def made(kind: str) -> Tokenizer:
    """Tokenizers of the kinds that people have."""
    bpe = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "reference":
        return Tokenizer.from_file(str(REFERENCE))
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        return trained(
            tokenizer,
            trainers.UnigramTrainer(
                vocab_size=600, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
            ),
        )
    if kind == "word piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return trained(
            tokenizer, trainers.WordPieceTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "llama" else None))
    if kind == "llama":  # a sign before the text, one word
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        trained(tokenizer, bpe)
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Replace("▁", " ")
    elif kind == "gpt4":
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        trained(tokenizer, bpe)
    elif kind == "digits":  # StarCoder
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        trained(tokenizer, bpe)
    elif kind == "spaces":  # GPT-NeoX: runs of spaces are added tokens
        tokenizer.pre_tokenizer = byte_level
        trained(tokenizer, bpe)
        tokenizer.add_tokens([" " * count for count in range(2, 25)])
    elif kind == "greedy":  # an added token that takes the white space beside it
        from tokenizers import AddedToken

        tokenizer.pre_tokenizer = byte_level
        trained(tokenizer, bpe)
        tokenizer.add_tokens([AddedToken("self", rstrip=True, lstrip=True)])
    return tokenizer


@pytest.mark.usefixtures("small_pieces")
def test_a_word_that_a_vocabulary_lacks_in_part_does_not_stop_a_text_from_being_cut() -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "twelve": 1}, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = " ".join(random.Random(0).choices(["one", "twelve"], k=20_000))
    assert tokenize([in_parts(text, 0)], tokenizer).tolist() == tokenizer.encode(text).ids


KINDS = ("reference", "gpt4", "digits", "spaces", "greedy", "llama", "unigram", "word piece")


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_PIECE", 3000)
    monkeypatch.setattr(encoding, "_BATCH", 10_000)
    monkeypatch.setattr(encoding, "_BUFFER", 20_000)
    monkeypatch.setattr(encoding, "_COMPARED", 500)
    monkeypatch.setattr(encoding, "_MOST_WORDS", 2_000)


def in_parts(text: str, seed: int) -> Iterator[str]:
    rng, at = random.Random(seed), 0
    while at < len(text):
        size = rng.randint(1, 9_000)
        yield text[at : at + size]
        at += size


SIGNS = "ab1 \n\t.,'()_é日😀ﬁ\u0301\u00a0\u2003\x1c\x85\r"
"""Letters, digits, signs, and all that someone counts as white space."""


def drawn(seed: int, count: int) -> str:
    rng = random.Random(seed)
    runs = ("<|endoftext|>", "self", "  ", "\n\n", "'s ", "'ll", " ▁", "))\n", "<s>")
    return "".join(rng.choice(SIGNS) if rng.random() < 0.8 else rng.choice(runs) for _ in range(count))


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
def test_a_text_in_pieces_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    for seed, text in enumerate([TEXT[:60_000], drawn(1, 40_000), TEXT[60_000:90_000].replace("\n", " "), "", "a"]):
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        found = tokenize([in_parts(text, seed)], tokenizer)
        assert np.array_equal(found, whole), seed


@pytest.mark.usefixtures("small_pieces")
def test_a_text_without_a_seam_is_encoded_as_a_whole() -> None:
    tokenizer, text = made("reference"), "é" * 50_000
    assert tokenize([in_parts(text, 0)], tokenizer).tolist() == tokenizer.encode(text).ids


FRAGMENTS = (
    "):\n",
    "):",
    "\n\n",
    "    ",
    "return ",
    "self",
    ".",
    "'s",
    "' ",
    ")\n",
    "\n",
    " ",
    "<|endoftext|>",
    "12345",
)


@given(st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(SIGNS) | st.characters(codec="utf-8"), max_size=60))
def test_words_have_the_same_ids_wherever_they_stand(fragments: list[str]) -> None:
    text = "".join(fragments)
    for tokenizer in WORDED:
        words = word_pattern(json.loads(tokenizer.to_str()))
        assert words is not None
        parts = words.split(text)
        assert "".join(parts) == text
        ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids


WORDED = [made(kind) for kind in ("reference", "gpt4", "digits", "spaces")]


def test_tokenizers_that_join_over_white_space_are_not_taken_word_by_word() -> None:
    for kind in ("greedy", "llama", "unigram", "word piece"):
        assert word_pattern(json.loads(made(kind).to_str())) is None


def test_ids_are_held_in_the_smallest_type() -> None:
    assert tokenize(["a b"], made("reference")).dtype == np.uint16
    assert tokenize(["w65536"], word_tokenizer([f"w{i}" for i in range(65537)])).dtype == np.uint32


def test_documents_are_parted_by_the_end_of_text() -> None:
    tokenizer = word_tokenizer(["<|endoftext|>", "a", "b"])
    assert tokenize(["a b", "b"], tokenizer).tolist() == [1, 2, 0, 2, 0]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [1, 2, 7])
def test_where_documents_begin_is_where_their_own_ids_do(tokenizer: Tokenizer, count: int) -> None:
    texts = [" ".join(random.Random(seed).choices(["a", "word", "12", "\n"], k=300 * seed)) for seed in range(count)]
    found = encode([in_parts(text, 0) for text in texts], tokenizer)
    assert found.ids.tolist() == tokenize([in_parts(text, 0) for text in texts], tokenizer).tolist()
    lengths = [tokenize([text, ""], tokenizer).size - tokenize(["", ""], tokenizer).size // 2 for text in texts]
    assert found.starts.tolist() == [sum(lengths[:number]) for number in range(count)]
