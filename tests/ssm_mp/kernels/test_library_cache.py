"""What is kept is loaded only where it is whole and nobody else can have written it; there is always some folder."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.kernels import library_cache
from tests.ssm_mp.kernels.test_compiler import SCRIPT

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef0123"
NOBODY = 12345


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shared library: one function, and enough beside it to be cut off."""
    folder = tmp_path_factory.mktemp("library")
    source = "int answer(void) { return 42; }\nconst char filling[70000] = {1};\n"
    (folder / "a.c").write_text(source, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "a.c", "-o", "a.so"], cwd=folder, check=True)
    return folder / "a.so"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "kept"
    path.mkdir(mode=0o700)
    return path


def kept(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_kept_is_loaded(folder: Path, library: Path) -> None:
    assert library_cache.load([folder], KEY) is None
    library_cache.keep([folder], KEY, library)
    found = library_cache.load([folder], KEY)
    assert found is not None
    assert found.answer() == 42
    assert library_cache.load([folder], "another") is None


def test_each_library_is_itself_however_many_were_loaded_before(folder: Path, tmp_path: Path) -> None:
    for answer in (1, 2, 3):
        source, built = tmp_path / f"{answer}.c", tmp_path / f"{answer}.so"
        source.write_text(f"int answer(void) {{ return {answer}; }}\n", encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
        library_cache.keep([folder], f"{KEY}{answer}", built)
        found = library_cache.load([folder], f"{KEY}{answer}")
        assert found is not None
        assert found.answer() == answer


@pytest.mark.parametrize("size", [0, 1, 60_000, -1])
def test_a_library_that_was_cut_is_not_loaded_and_replaced(folder: Path, library: Path, size: int) -> None:
    library_cache.keep([folder], KEY, library)
    os.truncate(kept(folder), size % library.stat().st_size)
    assert library_cache.load([folder], KEY) is None
    library_cache.keep([folder], KEY, library)
    assert kept(folder).read_bytes() == library.read_bytes()
    assert library_cache.load([folder], KEY) is not None


@given(data=st.data())
def test_any_changed_byte_is_seen(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, library: Path) -> None:
    folder = tmp_path_factory.mktemp("kept")
    library_cache.keep([folder], KEY, library)
    content = bytearray(library.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    kept(folder).write_bytes(content)
    assert library_cache.load([folder], KEY) is None


def test_a_file_without_a_digest_in_its_name_is_compiled_anew(folder: Path, library: Path) -> None:
    shutil.copy(library, folder / f"kernels-{KEY}.so")
    assert library_cache.load([folder], KEY) is None
    library_cache.keep([folder], KEY, library)
    assert kept(folder).name != f"kernels-{KEY}.so"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_passed_over_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    home, temporary = usual(tmp_path, monkeypatch)
    assert library_cache.private_folders() == [home, temporary]
    home.chmod(mode)
    assert library_cache.private_folders() == [temporary]
    assert f"note: compiled kernels are not kept in {home}: others can write to it" in caplog.text
    temporary.chmod(mode)
    assert library_cache.private_folders() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_what_another_user_owns_is_not_trusted(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home, temporary = usual(tmp_path, monkeypatch)
    library_cache.keep(library_cache.private_folders(), KEY, library)
    os.chown(kept(home), NOBODY, NOBODY)
    assert library_cache.load([home], KEY) is None
    os.chown(home, NOBODY, NOBODY)
    assert library_cache.private_folders() == [temporary]
    assert "it belongs to another user" in caplog.text
    temporary.rename(tmp_path / "moved")
    temporary.symlink_to(tmp_path / "moved")
    assert library_cache.private_folders() == [temporary]
    os.lchown(temporary, NOBODY, NOBODY)
    assert library_cache.private_folders() == []


def test_a_file_that_others_can_write_to_is_not_loaded(folder: Path, library: Path) -> None:
    library_cache.keep([folder], KEY, library)
    kept(folder).chmod(0o666)
    assert library_cache.load([folder], KEY) is None


def test_folders_are_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual(tmp_path, monkeypatch)
    held = os.umask(0)
    try:
        found = library_cache.private_folders()
    finally:
        os.umask(held)
    assert [stat.S_IMODE(path.stat().st_mode) for path in found] == [0o700, 0o700]


def test_without_a_home_there_is_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, temporary = usual(tmp_path, monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert library_cache.private_folders() == [temporary]
    assert not (tmp_path / "missing").exists()
    monkeypatch.setattr(Path, "home", nobody_knows)
    assert library_cache.private_folders() == [temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert library_cache.private_folders() == [temporary]


def test_the_home_of_a_user_holds_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, temporary = usual(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library_cache.private_folders() == [tmp_path / ".cache" / "ssm-mp", temporary]


def test_many_at_once_keep_and_load_whole_libraries(folder: Path, library: Path) -> None:
    def work(_: int) -> bool:
        library_cache.keep([folder], KEY, library)
        found = library_cache.load([folder], KEY)
        return found is None or found.answer() == 42

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert kept(folder).read_bytes() == library.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["emptied", "cut", "open to others"])
def test_kernels_are_there_whatever_became_of_the_cache(tmp_path: Path, damage: str) -> None:
    first, folder = started(tmp_path), tmp_path / "cache" / "ssm-mp"
    if damage == "open to others":
        folder.chmod(0o777)
    else:
        os.truncate(kept(folder), 0 if damage == "emptied" else 60_000)
    again = started(tmp_path)
    assert again.stdout == first.stdout
    assert first.stdout.startswith("True")
    assert again.stderr.count("\n") == again.stderr.count("others can write to it") == (damage == "open to others")
    assert started(tmp_path).stdout == first.stdout


NAMELESS = """
import pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""


@pytest.mark.slow
def test_a_user_without_home_and_name_has_kernels(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NAMELESS + SCRIPT], capture_output=True, encoding="utf-8", env=environment, check=False
    )
    assert done.stdout.startswith("True"), done.stderr
    assert list((tmp_path / f"ssm-mp-{os.geteuid()}").iterdir())


def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The two usual folders, both under the folder of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache" / "ssm-mp", tmp_path / f"ssm-mp-{os.geteuid()}"


def nobody_knows() -> Path:
    raise RuntimeError("Could not determine home directory.")


def started(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A process that computes with kernels, and has the cache of this test."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, encoding="utf-8", env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done
