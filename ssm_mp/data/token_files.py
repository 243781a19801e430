"""Token ids in files: those that a user gives as `.npy`, and those that a run keeps so that a text is read once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, __version__

from ssm_mp.data.encoding import END_OF_TEXT, Encoded, encode
from ssm_mp.data.texts import READ, Document, documents, holds_documents
from ssm_mp.data.windows import Ints, TokenIds
from ssm_mp.errors import DataError

Say = Callable[[str], None]

ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]")
"""Names of the token that stands after each document of a file, the first that a tokenizer knows counts."""

KEPT_FROM = 1 << 20
"""Bytes of a text from which on its ids are kept: less is encoded in a moment."""

ONE_DOCUMENT: Ints = np.zeros(1, dtype=np.int64)
"""Where the only document of a text begins."""

_STEP = 1 << 18
"""Bytes of a text that are one step of encoding it. Of a table, whose texts are compressed, it is more."""

_DIGEST_BYTES = hashlib.sha256().digest_size


Steps = Callable[[str, int], Callable[[], None]]
"""Given a stage and its number of steps, what is to be called after each of them."""

Text = str | Path | Sequence[Path]
"""A file, or several that are one text together."""


def read_tokens(
    text: Text,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    field: str = "text",
    *,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> TokenIds:
    """The ids of `read_documents`."""
    return read_documents(text, tokenizer, vocabulary, field, cache=cache, say=say).ids


def read_documents(
    text: Text,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    field: str = "text",
    *,
    cache: Path | None = None,
    say: Say = lambda line: None,
    steps: Steps = lambda stage, total: lambda: None,
) -> Encoded:
    """Token ids of `.npy` files, or of texts, JSON lines and tables through the tokenizer; and where documents begin.

    Of several files each is a document of its own at least. field: which field of JSON lines, or column of a table, is
    the text. cache: folder in which the ids of a long text are kept, and found again by whoever reads the same text
    with the same tokenizer; they are mapped then.
    Raises DataError for a missing file, ids outside the vocabulary, a text without a tokenizer, or another kind of
    file.
    """
    paths = [Path(text)] if isinstance(text, str | Path) else [Path(path) for path in text]
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected one file: {READ}")
        if not path.is_file():
            raise DataError(f"no text or token file at {path}")
    arrays = [path for path in paths if path.suffix == ".npy"]
    if arrays:
        return _joined_ids(paths, arrays, vocabulary)
    named = _named(paths)
    if tokenizer is None:
        raise DataError(
            f'{named}: a text needs a tokenizer ([data] tokenizer = "…/tokenizer.json"), or give token ids as .npy'
        )
    apart = len(paths) > 1 or holds_documents(paths[0])
    ends = ENDS_OF_TEXT if apart else ()

    @functools.cache
    def encoded() -> Encoded:
        return _encoded(paths, tokenizer, field, ends, steps)

    if cache is None or sum(path.stat().st_size for path in paths) < KEPT_FROM:
        found = encoded()
    else:
        kept_at = cache / f"tokens-{_key(paths, tokenizer, field, ends)[:16]}.npy"
        ids = kept(kept_at, lambda: encoded().ids, say)
        starts = ONE_DOCUMENT
        if apart:
            starts = kept(kept_at.with_name(f"documents-{kept_at.name}"), lambda: encoded().starts, say)
        found = Encoded(ids, starts)
    return Encoded(within_vocabulary(found.ids, vocabulary, named, tokenizer), found.starts)


def _joined_ids(paths: Sequence[Path], arrays: Sequence[Path], vocabulary: int) -> Encoded:
    """Token ids of files one after another; those of a single file stay mapped."""
    if len(arrays) < len(paths):
        other = next(path for path in paths if path not in arrays)
        raise DataError(f"{arrays[0]} holds token ids and {other} is a text: one study reads the one or the other")
    parts = [within_vocabulary(_read_ids(path), vocabulary, str(path)) for path in arrays]
    if len(parts) == 1:
        return Encoded(parts[0], ONE_DOCUMENT)
    starts = np.cumsum([0, *(part.size for part in parts[:-1])], dtype=np.int64)
    return Encoded(np.concatenate(parts), starts)


def _named(paths: Sequence[Path]) -> str:
    """A text in an error."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _encoded(
    paths: Sequence[Path], tokenizer: Tokenizer, field: str, ends: tuple[str, ...], steps: Steps
) -> Encoded:  # fmt: skip
    """The documents of files. Raises DataError where the tokenizer has none for a word."""
    every = (document for path in paths for document in documents(path, field))
    total = max(1, sum(path.stat().st_size for path in paths) // _STEP)
    try:
        return encode(_counted(every, total, steps("encoding the text", total)), tokenizer, ends)
    except Exception as error:
        if type(error) is not Exception:  # a bare one is the library's, for words without an id
            raise
        raise DataError(f"{_named(paths)}: {no_id(tokenizer, error)}") from None


def _counted(every: Iterable[Document], total: int, step: Callable[[], None]) -> Iterator[Document]:
    """The same documents; `step` is called `total` times, as often as so many bytes were read, and at the end."""
    read, stepped = 0, 0

    def parts(document: Document) -> Iterator[str]:
        nonlocal read, stepped
        for part in document:
            yield part
            read += len(part.encode("utf-8", "replace"))
            while stepped < min(read // _STEP, total - 1):
                step()
                stepped += 1

    yield from map(parts, every)
    for _ in range(total - stepped):
        step()


def no_id(tokenizer: Tokenizer, error: Exception) -> str:
    """Why a text cannot be encoded, in a sentence."""
    if "unk" in str(error).lower():
        return (
            f"it holds words or characters that the tokenizer's {tokenizer.get_vocab_size()} entries lack, and there "
            "is no entry for unknown ones; give the tokenizer that the model was trained with, or token ids as .npy"
        )
    return f"the tokenizer cannot encode it ({error})"


def within_vocabulary(ids: TokenIds, vocabulary: int, where: str, tokenizer: Tokenizer | None = None) -> TokenIds:
    """The same ids; raises DataError where one is outside the model's vocabulary, and says which token that is."""
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        return ids
    at = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
    token = None if tokenizer is None else tokenizer.id_to_token(int(ids[at]))
    named = "" if token is None else f" ({token!r})"
    raise DataError(
        f"{where}: token id {int(ids[at])}{named} at position {at} is outside the model's vocabulary of {vocabulary}"
    )


def _read_ids(path: Path) -> TokenIds:
    try:
        ids = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file of numbers ({error})") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path}: expected integer token ids, found {getattr(ids, 'dtype', type(ids).__name__)}")
    return ids.reshape(-1)


def _key(paths: Sequence[Path], tokenizer: Tokenizer, field: str, ends: tuple[str, ...]) -> str:
    """What ids depend on: the bytes of each file, how they are read, the tokenizer, the library."""
    said: list[str] = []
    for path in paths:
        with path.open("rb") as file:
            said += [hashlib.file_digest(file, "sha256").hexdigest(), "".join(path.suffixes[-2:])]
    settings = "\0".join((*said, field, *ends, __version__, tokenizer.to_str()))
    return hashlib.sha256(settings.encode()).hexdigest()


def kept(path: Path, make: Callable[[], TokenIds], say: Say) -> TokenIds:
    """The ids of a file, mapped; where it is missing or damaged they are made, and written whole.

    The file is a `.npy` followed by the SHA-256 of all before it.
    """
    found = _mapped(path)
    if found is not None:
        return found
    say(f"encoding the text; its ids are kept in {path}")
    ids = make()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(ids))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for part in (header.getvalue(), ids.data, _digest(header.getvalue(), ids)):
                file.write(part)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        say(f"note: the ids of the text cannot be kept, other processes encode it again ({error})")
    return ids


def _digest(header: bytes, ids: TokenIds) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(ids.data)
    return digest.digest()


def _mapped(path: Path) -> TokenIds | None:
    """The ids of a file that was written whole and is as it was written; None for any other."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            digest = hashlib.sha256()
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            if size or file.read() != digest.digest():
                return None
        ids: TokenIds = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return ids
