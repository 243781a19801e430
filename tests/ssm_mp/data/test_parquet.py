"""Tables of texts: what a column gives, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ssm_mp.data.texts import documents
from ssm_mp.errors import DataError, MissingError

arrow = pytest.importorskip("pyarrow", reason="pip install -c constraints.txt '.[parquet]'")


def table(path: Path, **columns: object) -> Path:
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path, row_group_size=3)
    return path


def texts(path: Path, field: str = "text") -> list[str]:
    return ["".join(document) for document in documents(path, field)]


def test_each_row_is_a_document(tmp_path: Path) -> None:
    said = [f"text {i} é" for i in range(10)]
    plain = table(tmp_path / "a.parquet", id=list(range(10)), text=said)
    assert texts(plain) == said
    named = table(tmp_path / "b.parquet", content=arrow.array(said).dictionary_encode())
    assert texts(named, "content") == said


def test_a_table_without_such_texts_says_what_it_has(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", text=["a", None], id=[1, 2])
    with pytest.raises(DataError, match="row 2: no text in the column 'text'"):
        texts(path)
    with pytest.raises(DataError, match=r"no column 'body'; there are 'text', 'id'\. .*text_field"):
        texts(path, "body")
    with pytest.raises(DataError, match="the column 'id' is int64, expected texts"):
        texts(path, "id")


def test_without_pyarrow_the_line_that_installs_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match=r"pip install -c constraints\.txt '\.\[parquet\]'"):
        texts(path)
