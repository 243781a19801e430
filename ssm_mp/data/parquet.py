"""Parquet tables → the texts of one column, a document a row, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssm_mp.data.missing_field import missing_field
from ssm_mp.errors import DataError, MissingError

_ROWS = 1024
"""Rows that are read at a time."""


def parquet_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of the column `field`, in the order of the rows.

    Raises MissingError without pyarrow, DataError for a damaged file, a column that is missing or holds no texts, and
    for a row without a text.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingError(
            f"{path}: a Parquet table needs pyarrow, which this Python lacks: "
            "pip install -c constraints.txt '.[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            _require_column(path, table.schema_arrow, field)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f"{path}, row {row}: no text in the column {field!r}")
                    yield text
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not a readable Parquet table ({reason})") from None


def _require_column(path: Path, schema: object, field: str) -> None:
    """Raise DataError where a table's schema has no column of texts of that name."""
    from pyarrow import types

    kinds = {column.name: column.type for column in schema}  # type: ignore[attr-defined]  # a pyarrow.Schema
    if field not in kinds:
        raise missing_field(str(path), "column", field, kinds)
    kind = kinds[field]
    held = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(held) or types.is_large_string(held) or types.is_string_view(held)):
        raise DataError(f"{path}: the column {field!r} is {kind}, expected texts")
