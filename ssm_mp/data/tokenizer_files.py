"""Files that hold a tokenizer → a `tokenizers.Tokenizer`, whatever their kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ssm_mp.data.sentencepiece_models import read_sentencepiece
from ssm_mp.data.special_tokens import looks_special
from ssm_mp.data.token_files import no_id, within_vocabulary
from ssm_mp.data.vocabularies import byte_level, bytes_tokenizer, plain_tokenizer, plain_vocabulary, text_vocabulary
from ssm_mp.errors import DataError

BYTES = "bytes"
"""Name of the tokenizer of byte-level models: each byte of the UTF-8 text is its own id."""

IDS_INSTEAD = (
    "or encode the text yourself and give its token ids: numpy.save('ids.npy', ids), [data] text = \"ids.npy\""
)

_READ = 'read are tokenizer.json, tokenizer.model, vocab.json with merges.txt, plain vocabularies, and "bytes"'

_NAMES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocabulary.json", "token2id.json",
    "char2id.json", "vocab.txt",
)  # fmt: skip
"""Names of tokenizer files, in the order in which they are looked for in a folder."""

_SPECIALS = ("<|endoftext|>", "<|startoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>")
"""Tokens of a byte-level vocabulary that a text's spelling of them stands for, as in GPT-2 and RoBERTa."""


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a folder, if any."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def load_tokenizer(path: str | Path, vocabulary: int, say: Callable[[str], None] = lambda line: None) -> Tokenizer:
    """The tokenizer of a file, of a folder that holds one, or of the name `bytes`.

    say: told what was assumed. Raises DataError where it cannot be read, or has entries beyond the model's vocabulary
    other than added ones, which a text need not use.
    """
    path = Path(path)
    named = str(path) == BYTES and not path.exists()
    tokenizer = bytes_tokenizer() if named else _read(_file(path), say)
    tokenizer.no_truncation()  # whatever was saved with it, a text is read whole
    tokenizer.no_padding()
    _require_fitting(tokenizer, vocabulary, path, say)
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str, vocabulary: int) -> list[int]:
    """Token ids of a prompt. Raises DataError where the tokenizer or the model's vocabulary has none for a word."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:
        if type(error) is not Exception:  # a bare one is the library's, for words without an id
            raise
        raise DataError(f"the prompt: {no_id(tokenizer, error)}") from None
    import numpy as np

    within_vocabulary(np.array(ids, dtype=np.int64), vocabulary, "the prompt", tokenizer)
    return ids


def _file(path: Path) -> Path:
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise DataError(f"{path}: no tokenizer in this folder: {_READ}; {IDS_INSTEAD}")
        return found
    if not path.is_file():
        raise DataError(
            f"no tokenizer at {path}: expected a tokenizer.json of the `tokenizers` library, or another that is read "
            f"({_READ}); {IDS_INSTEAD}"
        )
    return path


def _read(path: Path, say: Callable[[str], None]) -> Tokenizer:
    if path.suffix == ".json":
        return _read_json(path, say)
    if path.suffix == ".model":
        return read_sentencepiece(path)
    if path.name == "merges.txt":
        return _read_json(path.with_name("vocab.json"), say)
    if path.suffix in (".txt", ".vocab"):
        return plain_tokenizer(text_vocabulary(path, _text_of(path)), path, say)
    raise DataError(f"{path}: not a kind of tokenizer that is read: {_READ}; {IDS_INSTEAD}")


def _read_json(path: Path, say: Callable[[str], None]) -> Tokenizer:
    try:
        content = json.loads(_text_of(path))
    except ValueError as error:
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library: not JSON ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        try:
            return Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exception for every unreadable file
            raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from None
    vocabulary = plain_vocabulary(content)
    if vocabulary is None:
        raise DataError(
            f"{path}: not a tokenizer.json of the `tokenizers` library, nor a vocabulary (token → id, or token2id, "
            f"token_to_id, stoi, vocab with such a table); {IDS_INSTEAD}"
        )
    merges = path.with_name("merges.txt")
    if path.name == "vocab.json" and merges.is_file():
        return _with_specials(byte_level(vocabulary, _merges(merges), path), path.parent)
    return plain_tokenizer(vocabulary, path, say)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a UTF-8 text ({error.reason} at byte {error.start}), so no tokenizer that is read: {_READ}; "
            f"{IDS_INSTEAD}"
        ) from None
    except FileNotFoundError:
        raise DataError(f"no {path.name} in {path.parent}: merges.txt needs it") from None


def _merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`, a pair on each line. Raises DataError for any other line."""
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise DataError(f"{path}, line {number}: expected two symbols, found {line!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _with_specials(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """With the added tokens that stand beside, and those that the vocabulary has of the usual names."""
    beside: dict[str, Any] = {}
    if (folder / "added_tokens.json").is_file():
        beside = json.loads(_text_of(folder / "added_tokens.json"))
    known = [name for name in _SPECIALS if tokenizer.token_to_id(name) is not None]
    # the library numbers new tokens from the vocabulary's end on
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in known])
    for name, number in sorted(beside.items(), key=lambda entry: entry[1]):
        tokenizer.add_special_tokens([AddedToken(name, normalized=False)])
        found = tokenizer.token_to_id(name)
        if found != number:
            raise DataError(
                f"{folder / 'added_tokens.json'}: {name!r} has id {number}, expected {found}, the next after the "
                f"vocabulary; {IDS_INSTEAD}"
            )
    return tokenizer


def _require_fitting(tokenizer: Tokenizer, vocabulary: int, path: Path, say: Callable[[str], None]) -> None:
    """Accept added or special entries beyond the vocabulary, with a note; refuse others."""
    entries = tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted((number, token) for token, number in entries.items() if number >= vocabulary)
    if not beyond:
        return
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    foreign = [token for _, token in beyond if token not in added and not looks_special(token)]
    if foreign:
        raise DataError(
            f"{path}: the tokenizer has {len(entries)} entries, the model's vocabulary {vocabulary}; "
            f"this tokenizer does not belong to this checkpoint ({foreign[0]!r} has no row in its embedding)"
        )
    names = ", ".join(repr(token) for _, token in beyond[:5]) + (", …" if len(beyond) > 5 else "")
    say(
        f"note: {len(beyond)} added tokens of {path} are beyond the model's vocabulary of {vocabulary} and may not "
        f"occur in a text: {names}"
    )
