"""`tokenizer.model`: SentencePiece's own file (a protocol buffer) → a tokenizer with the same ids.

The fields are those of `sentencepiece_model.proto`. Read are BPE models that leave their text as it is (Llama's,
Mistral's), with and without byte fallback: on these the ids are SentencePiece's own. Where the `tokenizers` library
differs from it (ties of unigram models, combining marks under NFKC), a model is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from ssm_mp.data.special_tokens import HIDDEN
from ssm_mp.errors import DataError

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", 3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"

Value = int | float | bytes


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class _Model:
    """What of a file decides on ids."""

    pieces: tuple[_Piece, ...]
    kind: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model file. Raises DataError for other files, and for kinds that are not read.

    Control and unknown pieces (`<s>`, `<unk>`) are never spelled by a text; in the tokenizer their names begin with
    `HIDDEN`.
    """
    try:
        model = _parsed(path.read_bytes())
    except (ValueError, struct.error, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a SentencePiece model ({error}); give a tokenizer.json of the `tokenizers` library, or "
            "encode the text yourself and give its token ids as .npy"
        ) from None
    reason = _not_read(model)
    if reason is not None:
        raise DataError(
            f"{path}: a SentencePiece model {reason}, which is not read; make a tokenizer.json of it: "
            "transformers.AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…), or encode the text "
            "yourself and give its token ids as .npy"
        )
    tokenizer = Tokenizer(_bpe(model))
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(HIDDEN, ""),
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []),
        ]
    )
    return tokenizer


def _not_read(model: _Model) -> str | None:
    if model.kind != _BPE:
        return f"of the kind {_KINDS.get(model.kind, model.kind)}"
    if model.charsmap:
        return "that normalises its text (NFKC)"
    if any(piece.kind == _USER_DEFINED for piece in model.pieces):
        return "with symbols that its user defined"
    if sum(piece.kind == _UNKNOWN for piece in model.pieces) != 1:
        return "without a piece for what is unknown"
    return None


def _names(model: _Model) -> list[str]:
    """The pieces' names: hidden where no text may spell them."""
    hidden = (_UNKNOWN, _CONTROL, _UNUSED)
    return [HIDDEN + piece.text if piece.kind in hidden else piece.text for piece in model.pieces]


def _unknown(model: _Model) -> int:
    return next(i for i, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN)


def _bpe(model: _Model) -> models.BPE:
    """Any two pieces that together are a piece are joined, the highest score first."""
    names = _names(model)
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges = [
        (-score, len(text[:at]), text[:at], text[at:])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=names[_unknown(model)],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _normalizer(model: _Model) -> normalizers.Normalizer:
    signs: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if model.strip_spaces:  # before they are signs, but for the last ones: as SentencePiece does it
        spaces = [normalizers.Replace(Regex("\\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        signs = [*spaces, *signs, normalizers.Replace(Regex(f"{_SPACE}+\\z"), "")]
    return normalizers.Sequence([*signs, *([normalizers.Prepend(_SPACE)] if model.dummy_prefix else [])])


def _parsed(data: bytes) -> _Model:
    pieces: list[_Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_as_bytes(value)))
            score, kind = piece.get(2, 0.0), piece.get(3, _NORMAL)
            if not isinstance(score, float) or not isinstance(kind, int):
                raise ValueError("a piece of another kind")
            pieces.append(_Piece(_as_bytes(piece.get(1, b"")).decode("utf-8"), score, kind))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces or len({piece.text for piece in pieces} - {""}) < len(pieces):
        raise ValueError("no pieces, an empty one, or the same piece twice")
    if not normalizer.get(5, 1) or trainer.get(24, 0):
        raise ValueError("spaces are written in another way")
    return _Model(
        pieces=tuple(pieces),
        kind=int(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        strip_spaces=bool(normalizer.get(4, 1)),
    )


def _as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Field numbers and values of a protocol buffer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 5:
            yield number, float(struct.unpack_from("<f", data, at)[0])
            at += 4
        elif wire == 1:
            yield number, float(struct.unpack_from("<d", data, at)[0])
            at += 8
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it ends too early")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"no protocol buffer at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number too long at byte {at}")
