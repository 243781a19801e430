"""Text files → documents, read piece by piece: UTF-8, JSON lines, Parquet tables; all else is refused by its name."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ssm_mp.data.missing_field import missing_field
from ssm_mp.data.parquet import parquet_texts
from ssm_mp.errors import DataError

Document = Iterable[str]
"""A text in parts, which follow one another without a gap."""

READ = (
    "read are UTF-8 texts, JSON lines (.jsonl, .jsonl.gz) and Parquet tables (.parquet) with a text field, and token "
    "ids as .npy"
)
"""What may be given as a text, for errors."""

_PART = 1 << 20
"""Characters that are read at a time."""

_TABLE = "write its texts as JSON lines"
_ARCHIVE = "unpack it"
_SUFFIXES = {
    ".parquet": ("a Parquet table", "let its name end in .parquet"),
    ".arrow": ("an Arrow table", _TABLE), ".feather": ("an Arrow table", _TABLE),
    ".csv": ("a table", f"{_TABLE}: pandas.read_csv(…)[['text']].to_json(…, orient='records', lines=True)"),
    ".tsv": ("a table", f"{_TABLE}: pandas.read_csv(…, sep='\\t')[['text']].to_json(…, orient='records', lines=True)"),
    ".zip": ("an archive", _ARCHIVE), ".tar": ("an archive", _ARCHIVE), ".tgz": ("an archive", _ARCHIVE),
    ".7z": ("an archive", _ARCHIVE), ".gz": ("compressed", "unpack it: gunzip"),
    ".bz2": ("compressed", "unpack it: bunzip2"), ".xz": ("compressed", "unpack it: unxz"),
    ".zst": ("compressed", "unpack it: unzstd"),
    ".pdf": ("a PDF", "take its text out first, e.g. with pdftotext"),
    ".docx": ("a word processor's file", "save it as plain text"),
    ".npz": ("an archive of arrays", "save its token ids alone: numpy.save('ids.npy', ids)"),
    ".bin": ("binary", "raw token ids are saved by numpy.save('ids.npy', numpy.fromfile(…, dtype=numpy.uint16))"),
    ".pt": ("a pickle", "save its token ids: numpy.save('ids.npy', ids.numpy())"),
    ".pkl": ("a pickle", "save its token ids: numpy.save('ids.npy', ids)"),
    ".safetensors": ("a file of tensors", "save its token ids: numpy.save('ids.npy', ids)"),
}  # fmt: skip
"""Kinds of files that are no text, by suffix: what it is, and the way out."""

_MAGIC = {
    b"PAR1": ".parquet", b"ARROW1": ".arrow", b"PK\x03\x04": ".zip", b"\x1f\x8b": ".gz", b"%PDF": ".pdf",
    b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"(\xb5/\xfd": ".zst", b"7z\xbc\xaf": ".7z",
}  # fmt: skip
"""The same kinds by their first bytes, whatever they are called."""

_FOREIGN = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def is_json_lines(path: Path) -> bool:
    """Whether a file's name says that each line is a JSON object."""
    return path.suffix in (".jsonl", ".ndjson", ".json") or path.suffixes[-2:] in ([".jsonl", ".gz"], [".json", ".gz"])


def holds_documents(path: Path) -> bool:
    """Whether a file's name says that it holds documents, each apart from the others."""
    return is_json_lines(path) or _is_parquet(path)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def documents(path: Path, field: str = "text") -> Iterator[Document]:
    """The documents of a file: the whole of a plain text, or the `field` of each line of JSON or row of a table.

    Raises DataError for other kinds of files, other encodings, and lines without the field.
    """
    if _is_parquet(path):
        yield from ([text] for text in parquet_texts(path, field))
        return
    _require_text(path)
    with _opened(path) as file:
        if is_json_lines(path):
            yield from ([text] for text in _decoded(path, _json_texts(path, file, field)))
        else:
            yield _decoded(path, iter(lambda: file.read(_PART), ""))


def _decoded(path: Path, parts: Iterable[str]) -> Iterator[str]:
    """The same parts; what is not UTF-8, or damaged, is a DataError."""
    try:
        yield from parts
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged ({error})") from None


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _require_text(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(1 << 16)
    kind = path.suffix.lower()
    if not is_json_lines(path):
        kind = next((suffix for magic, suffix in _MAGIC.items() if begin.startswith(magic)), kind)
        if kind in _SUFFIXES:
            what, way_out = _SUFFIXES[kind]
            raise DataError(f"{path} is {what}, not a text: {way_out}; {READ}")
    foreign = next((name for mark, name in _FOREIGN.items() if begin.startswith(mark)), None)
    if foreign is not None:
        raise DataError(
            f"{path}: not a UTF-8 text: byte 0x{begin[0]:02x} at the beginning is the mark of {foreign}; convert it: "
            f"iconv -f {foreign} -t UTF-8 {path.name} > text.txt"
        )
    if b"\0" in begin and path.suffix != ".gz":
        raise DataError(
            f"{path} is binary (a zero byte at {begin.index(0)}), not a text: if it is UTF-16, convert it with iconv "
            f"-f UTF-16LE -t UTF-8; {READ}"
        )


def _not_utf8(path: Path) -> str:
    """Which byte is no UTF-8, and the way out."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"{path}: not a UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start} (line "
            f"{1 + data.count(10, 0, error.start)}): {error.reason}; if it is Windows-1252 or Latin-1, convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > text.txt"
        )
    return f"{path}: not a UTF-8 text"  # it changed while it was read


def _json_texts(path: Path, file: TextIO, field: str) -> Iterator[str]:
    """The texts of JSON lines, or of one array of objects."""
    first = ""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if not first and line.lstrip().startswith("["):
            yield from _array_texts(path, line + file.read(), field)
            return
        first = first or line
        try:
            content = json.loads(line)
        except ValueError as error:
            hint = "" if first is not line else "; expected one JSON object on each line"
            raise DataError(f"{path}, line {number}: not JSON ({error}){hint}") from None
        yield _field(content, field, f"{path}, line {number}")


def _array_texts(path: Path, text: str, field: str) -> Iterator[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    for number, entry in enumerate(content, start=1):
        yield entry if isinstance(entry, str) else _field(entry, field, f"{path}, entry {number}")


def _field(content: Any, field: str, where: str) -> str:
    """The text of one document."""
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object with the field {field!r}, found {type(content).__name__}")
    if field not in content:
        raise missing_field(where, "field", field, content)
    text = content[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {field!r} is {type(text).__name__}, expected a text")
    return text
