"""Which files folders and patterns stand for, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_mp.data import named_files
from ssm_mp.errors import DataError


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    return folder


def found(*names: Path) -> list[str]:
    return [path.name for path in named_files(names).paths]


def test_a_pattern_stands_for_the_files_that_it_matches_sorted_by_path(tmp_path: Path) -> None:
    written(tmp_path, "b.py", "a.py", "c/a.py", "c/d/e.py", "a.txt", "a.py.d/x")
    assert found(tmp_path / "*.py*") == ["a.py", "b.py"]
    assert [path.relative_to(tmp_path).as_posix() for path in named_files([tmp_path / "**/*.py"]).paths] == [
        "a.py", "b.py", "c/a.py", "c/d/e.py",
    ]  # fmt: skip


def test_names_keep_their_order_and_a_file_counts_once(tmp_path: Path) -> None:
    written(tmp_path, "a.txt", "b.txt", "c.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert found(tmp_path / "c.txt", tmp_path / "*.txt", tmp_path) == ["c.txt", "a.txt", "b.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    written(tmp_path, "part[1].txt", "part1.txt")
    assert found(tmp_path / "part[1].txt") == ["part[1].txt"]


def test_a_folder_gives_the_files_of_its_first_kind_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    written(tmp_path, "README.md", "data/b.parquet", "data/a.parquet", ".cache/x.parquet", "x.jsonl")
    held = named_files([tmp_path])
    assert [path.name for path in held.paths] == ["a.parquet", "b.parquet"]
    assert held.notes == (
        f"{tmp_path}: 2 Parquet tables are read, and README.md, x.jsonl left out; a pattern names files itself",
    )
    texts = named_files([written(tmp_path / "texts", "b/b.txt", "a.TXT")])
    assert [path.name for path in texts.paths] == ["a.TXT", "b.txt"]
    assert texts.notes == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.jsonl", r"no file matches .*/\*\.jsonl"),
        ("c*", "only folders do"),
        ("absent.txt", "no text or token file at .*absent.txt"),
        ("code", r"holds no text that is known by its name .*code/\*\*/\*\.py"),
    ],
)
def test_a_name_without_a_file_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    written(tmp_path, "code/a.py")
    with pytest.raises(DataError, match=message):
        named_files([tmp_path / name])
