"""Documents → token ids, in pieces that give the same ids as the whole, with memory a small multiple of what is kept.

A text is cut at seams: places where its tokenizer joins nothing. For the common byte-level tokenizers these are known
(`seams.word_pattern`), and each word is encoded once; for any other a cut is kept only where the text around it gives
the same ids cut as whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ssm_mp.data.seams import checked_cuts, word_pattern
from ssm_mp.data.texts import Document
from ssm_mp.data.windows import Ints, TokenIds

END_OF_TEXT = "<|endoftext|>"

_PIECE = 1 << 15
"""Characters of a piece that is encoded by itself."""
_BATCH = 1 << 20
"""Characters that are encoded at a time."""
_BUFFER = 1 << 21
"""Characters of a document that are cut at a time."""
_MOST_WORDS = 1 << 20
"""Words that are remembered; beyond, they are forgotten and learned anew."""
_COMPARED = 1 << 16
"""Characters on which words are compared with the text as a whole before they are believed."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents one after another: token `ids [tokens]`, and where each document begins, `starts [documents]` int64."""

    ids: TokenIds
    starts: Ints


def tokenize(docs: Iterable[Document | str], tokenizer: Tokenizer, ends: Sequence[str] = (END_OF_TEXT,)) -> TokenIds:
    """The ids of `encode`."""
    return encode(docs, tokenizer, ends).ids


def encode(docs: Iterable[Document | str], tokenizer: Tokenizer, ends: Sequence[str] = (END_OF_TEXT,)) -> Encoded:
    """Token ids of all documents, each followed by the end of text where the tokenizer has one.

    ends: names of that token, the first that the tokenizer knows counts. A single document has no end. Ids have the
    smallest of the types uint16 and uint32 that holds the tokenizer's.
    """
    end = next((found for found in map(tokenizer.token_to_id, ends) if found is not None), None)
    kind = np.uint16 if _largest_id(tokenizer) <= np.iinfo(np.uint16).max else np.uint32
    encoder = _Encoder(tokenizer, end)
    parts: list[np.ndarray[Any, np.dtype[Any]]] = []
    ends_at: list[Ints] = []
    tokens, documents = 0, 0
    batch: list[_Piece] = []
    size = 0

    def close() -> None:
        nonlocal tokens
        found, lengths = encoder.ids(batch)
        parts.append(found.astype(kind))
        ends_at.append(tokens + lengths.cumsum()[[piece is _END for piece in batch]])
        tokens += found.size

    for document in docs:
        documents += 1
        for piece in encoder.pieces([document] if isinstance(document, str) else document):
            batch.append(piece)
            size += len(piece[0])
            if size >= _BATCH:
                close()
                batch, size = [], 0
        batch.append(_END)
    close()
    ids = np.concatenate(parts)
    starts: Ints = np.concatenate([np.zeros(1, dtype=np.int64), *ends_at])[:documents]
    return Encoded(ids[:-1] if documents == 1 and end is not None else ids, starts)


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


_Piece = tuple[str, bool]
"""A text that is encoded by itself, and whether it goes on from another."""
_END: _Piece = ("", True)
"""Stands for the end of a document."""


class _Encoder:
    """Cuts and encodes documents for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end: int | None) -> None:
        self._tokenizer = tokenizer
        self._end = np.zeros(0, dtype=np.int64) if end is None else np.array([end])
        content = json.loads(tokenizer.to_str())
        self._words = word_pattern(content)
        self._puts_sign = _puts_sign_before(content)
        self._trusted = False
        self._known: dict[str, int] = {}
        self._flat, self._starts, self._lengths = (np.zeros(0, dtype=np.int64) for _ in range(3))

    def pieces(self, document: Document) -> Iterator[_Piece]:
        """A document in pieces, of which each gives by itself the ids that it has in the whole."""
        rest, least, onward = "", _BUFFER, False
        for part in document:
            rest += part
            if len(rest) < least:
                continue
            *pieces, rest = self._cut(rest, last=False)
            least = _BUFFER if pieces else 2 * len(rest)  # a text without seams is read on
            for piece in pieces:
                yield piece, onward
                onward = True
        for piece in self._cut(rest, last=True) if rest else []:
            yield piece, onward
            onward = True

    def _cut(self, text: str, *, last: bool) -> list[str]:
        """The text in pieces; the last one may go on."""
        if len(text) <= _PIECE:
            return [text]
        if self._words is not None:
            at = 0 if last else self._words.last_seam(text)
            return [text[:at], text[at:]] if at else [text]
        cuts = checked_cuts(text, _PIECE, self._encode_whole, self._encode_onward)
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def ids(self, pieces: Sequence[_Piece]) -> tuple[TokenIds, Ints]:
        """Ids of pieces one after another, and how many each piece has."""
        if self._words is not None and self._believed(pieces):
            return self._by_words(pieces)
        found: list[TokenIds] = [self._end] * len(pieces)
        for onward, encode in ((False, self._encode_whole), (True, self._encode_onward)):
            numbers = [i for i, piece in enumerate(pieces) if piece is not _END and piece[1] is onward]
            for number, ids in zip(numbers, encode([pieces[i][0] for i in numbers]), strict=True):
                found[number] = np.array(ids, dtype=np.int64)
        lengths = np.array([part.size for part in found], dtype=np.int64)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64), lengths

    def _believed(self, pieces: Sequence[_Piece]) -> bool:
        """Whether encoding by words gives the ids of the whole: looked at once, on the first text that there is."""
        sample = next((piece[0][:_COMPARED] for piece in pieces if piece[0]), "")
        if not self._trusted and sample:
            self._trusted = np.array_equal(self._by_words([(sample, False)])[0], self._encode_whole([sample])[0])
            if not self._trusted:
                self._words = None
        return self._trusted

    def _by_words(self, pieces: Sequence[_Piece]) -> tuple[TokenIds, Ints]:
        """Each different word is encoded once."""
        assert self._words is not None
        if len(self._known) > _MOST_WORDS or not self._known:
            self._known = {"": 0}  # the end of a text, which no word is
            self._flat, self._starts = self._end, np.zeros(1, dtype=np.int64)
            self._lengths = np.array([self._end.size])
        words: list[str] = []
        until = [0]  # words before each piece and after the last
        for piece in pieces:
            words += [""] if piece is _END else self._words.split(piece[0])
            until.append(len(words))
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        self._learn(new)
        numbers = np.fromiter(map(self._known.__getitem__, words), dtype=np.int64, count=len(words))
        lengths = self._lengths[numbers]
        before = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
        at: TokenIds = np.repeat(self._starts[numbers] - before[:-1], lengths) + np.arange(before[-1])
        return self._flat[at], np.diff(before[until])

    def _learn(self, words: Sequence[str]) -> None:
        encoded = self._encode_whole(words)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        self._known.update(zip(words, range(len(self._known), len(self._known) + len(words)), strict=True))
        self._starts = np.concatenate([self._starts, self._flat.size + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        flat = np.fromiter((i for ids in encoded for i in ids), dtype=np.int64, count=int(lengths.sum()))
        self._flat = np.concatenate([self._flat, flat])

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return _encoded(self._tokenizer, texts)

    def _encode_onward(self, texts: Sequence[str]) -> list[list[int]]:
        """Of what goes on from another piece: its first space is the sign that the tokenizer would put before it."""
        return _encoded(self._tokenizer, [text.removeprefix(" ") for text in texts] if self._puts_sign else texts)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without special tokens around it and without offsets where the library can leave them out."""
    encode: Callable[..., list[Any]] = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    found: list[list[int]] = []
    size, first = 0, 0
    for number, text in enumerate(texts, start=1):  # what the library returns is far larger than its ids
        size += len(text)
        if size >= _BATCH or number == len(texts):
            found += [one.ids for one in encode(list(texts[first:number]), add_special_tokens=False)]
            size, first = 0, number
    return found


def _puts_sign_before(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer (the content of its tokenizer.json) puts the sign of a space before every text.

    Those that do so only before what begins with no space need no care: what goes on from a cut begins with one.
    """
    normalizer = tokenizer.get("normalizer") or {}
    return any(part["type"] == "Prepend" for part in [normalizer, *normalizer.get("normalizers", [])] if part)
