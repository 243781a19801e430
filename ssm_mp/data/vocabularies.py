"""Vocabularies without a `tokenizer.json`: bytes, byte-level BPE of two files, words, characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ssm_mp.data.special_tokens import looks_special
from ssm_mp.errors import DataError

_TABLES = ("token2id", "token_to_id", "stoi", "char2id", "char_to_id", "char_to_idx", "word2id", "word_to_id",
           "word2idx", "vocab", "vocabulary")  # fmt: skip
"""Keys under which people keep the table token → id."""
_LISTS = ("itos", "id2token", "id_to_token", "idx_to_char", "id2char", "idx2word", "tokens")
"""Keys under which they keep the tokens in the order of their ids."""

_UNKNOWN = ("<unk>", "<UNK>", "[UNK]", "[unk]", "<|unk|>", "UNK", "<unknown>", "<oov>", "<OOV>")


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255: the bytes of the UTF-8 text."""
    signs = _signs()
    tokenizer = Tokenizer(models.BPE(vocab={signs[i]: i for i in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # long runs are cut so that none is worked on as one word: bytes are never joined
        [
            pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], path: Path) -> Tokenizer:
    """The byte-level BPE of GPT-2: `vocab.json` (token → id) and the pairs of `merges.txt`, the first joined first.

    Raises DataError where the vocabulary has no sign for some byte (it is of another kind of BPE then), or lacks what
    a merge makes.
    """
    missing = [sign for sign in _signs() if sign not in vocabulary]
    if missing or any(token.endswith("</w>") for token in vocabulary):
        raise DataError(
            f"{path}: not the byte-level vocabulary of GPT-2 ({len(missing)} of 256 bytes have no entry); give the "
            "tokenizer.json of the `tokenizers` library: AutoTokenizer.from_pretrained(…, use_fast=True)"
            ".save_pretrained(…)"
        )
    absent = next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None)
    if absent is not None:
        raise DataError(f"{path}: no entry for the merge {absent[0]!r} {absent[1]!r} of merges.txt beside it")
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def plain_vocabulary(content: Any) -> dict[str, int] | None:
    """The table token → id of a JSON file; None where it holds none."""
    if isinstance(content, list):
        return _numbered(content)
    if not isinstance(content, dict):
        return None
    if content and all(isinstance(number, int) and not isinstance(number, bool) for number in content.values()):
        return dict(content)
    for key in _TABLES:
        found = plain_vocabulary(content[key]) if isinstance(content.get(key), dict | list) else None
        if found:
            return found
    for key in _LISTS:
        held = content.get(key)
        if isinstance(held, dict):
            held = _by_number(held)
        if isinstance(held, list) and (found := _numbered(held)):
            return found
    return _numbered(_by_number(content) or [])


def _numbered(tokens: list[Any]) -> dict[str, int] | None:
    if not tokens or not all(isinstance(token, str) for token in tokens) or len(set(tokens)) < len(tokens):
        return None
    return {token: number for number, token in enumerate(tokens)}


def _by_number(table: Mapping[Any, Any]) -> list[Any] | None:
    """The values of a table id → token, in the order of the ids 0, 1, …"""
    if not all(isinstance(key, str) and key.isdecimal() for key in table):
        return None
    ordered = {int(key): token for key, token in table.items()}
    return [ordered[i] for i in range(len(ordered))] if sorted(ordered) == list(range(len(table))) else None


def text_vocabulary(path: Path, text: str) -> dict[str, int]:
    """A `vocab.txt`: a token on each line, numbered from 0, or a token and its id with a tab between."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    pairs = [line.rsplit("\t", 1) for line in lines]
    if all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
        table = {pair[0]: int(pair[1]) for pair in pairs}
    else:
        table = {line: number for number, line in enumerate(lines)}
    if len(table) < len(lines):
        raise DataError(f"{path}: {len(lines) - len(table)} lines repeat an earlier token")
    if any(token.startswith("##") and len(token) > 2 for token in table):
        raise DataError(
            f"{path}: a WordPiece vocabulary, which does not say how its text is normalised; give the tokenizer.json "
            "of the `tokenizers` library: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)"
        )
    return table


def plain_tokenizer(vocabulary: Mapping[str, int], path: Path, say: Callable[[str], None]) -> Tokenizer:
    """A tokenizer of words, or where all entries but special ones are single characters, of characters.

    Words stand between white space. Where the vocabulary has signs as entries of their own and no entry that mixes
    them with letters, they are words of their own. Where no entry has a capital letter, the text is lower-cased. Other
    words are the entry for unknown ones, or an error where there is none.
    """
    if len(set(vocabulary.values())) < len(vocabulary) or min(vocabulary.values()) < 0:
        raise DataError(f"{path}: two tokens share an id, or one is negative")
    ordinary = [token for token in vocabulary if not looks_special(token) and token not in _UNKNOWN]
    unknown = next((name for name in _UNKNOWN if name in vocabulary), None)
    # without an entry for unknown words the library raises at the first
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(vocabulary), unk_token=unknown or "\ue000"))
    if all(len(token) == 1 for token in ordinary):
        level = "characters"
        splitting: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        level, splitting = _word_level(ordinary)
    tokenizer.pre_tokenizer = splitting
    lower = any(map(str.islower, ordinary)) and not any(token != token.lower() for token in ordinary)
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    specials = [token for token in vocabulary if looks_special(token) and token != unknown]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    say(
        f"note: {path} is taken for a vocabulary of {len(ordinary):,} {level}{', lower-cased' if lower else ''}; what "
        f"it lacks is {'an error' if unknown is None else repr(unknown)}"
    )
    return tokenizer


def _word_level(ordinary: Sequence[str]) -> tuple[str, pre_tokenizers.PreTokenizer]:
    """How a text is parted into words, and that in a word."""
    signs = [token for token in ordinary if re.fullmatch(r"[^\w\s]+", token)]
    mixed = any(re.search(r"\w", token) and re.search(r"[^\w\s]", token) for token in ordinary)
    if not signs or mixed:
        return "words between white space", pre_tokenizers.WhitespaceSplit()
    if all(len(token) == 1 for token in signs):
        return "words and single signs", pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
        )
    return "words and runs of signs", pre_tokenizers.Whitespace()


def _signs() -> list[str]:
    """The printable signs that stand for the bytes 0 to 255 in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in signs)
    signs.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return [signs[byte] for byte in range(256)]
