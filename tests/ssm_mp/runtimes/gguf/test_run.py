"""llama.cpp asked about a file in a process of its own: bad files, bad ids, another library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssm_mp.errors import DisagreementError
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.gguf import run as runner
from ssm_mp.runtimes.gguf.format import GGUF
from ssm_mp.runtimes.running import run
from tests.ssm_mp.runtimes.checking import ids_of, item_of
from tests.ssm_mp.runtimes.gguf.models import checkpoint_of

VOCABULARY = 101


@pytest.fixture(scope="module")
def item() -> Exportable:
    return item_of(checkpoint_of("bamba/plain"), {"*": "int8"})


@pytest.fixture
def file(tmp_path: Path, item: Exportable) -> Path:
    path = tmp_path / "model.gguf"
    GGUF.write(item, path)
    return path


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[: len(content) // 2], "not within the file bounds"),
        (lambda content: b"", "does not load"),
        (lambda content: b"nonsense" * 100, "invalid magic"),
        (lambda content: content.replace(b"ssm.state_size", b"ssm.state_sizf"), "key not found"),
        (lambda content: content.replace(b"blk.0.ssm_out", b"blk.0.ssm_oux"), "ssm_out"),
    ],
    ids=["half", "empty", "nonsense", "key", "tensor"],
)
def test_a_damaged_file_is_refused_in_llama_cpps_words(file: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(DisagreementError, match=said):
        run(GGUF, file, ids_of(VOCABULARY).numpy(), VOCABULARY)


def test_a_token_that_the_file_has_not_is_refused(file: Path) -> None:
    with pytest.raises(DisagreementError, match="token ids from 500 to 500, but the file has 101 tokens"):
        run(GGUF, file, np.full((1, 4), 500, dtype=np.int64), VOCABULARY)


def test_windows_that_are_read_in_parts_give_what_they_give_in_one(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = ids_of(VOCABULARY, windows=2, length=40).numpy()
    whole = run(GGUF, file, ids, VOCABULARY)
    short = tmp_path / "run.py"
    source = Path(runner.__file__).read_text(encoding="utf-8")
    short.write_text(source.replace("MOST_TOKENS = 512", "MOST_TOKENS = 7"), encoding="utf-8")
    assert "MOST_TOKENS = 7" in short.read_text(encoding="utf-8")
    monkeypatch.setattr("ssm_mp.runtimes.gguf.format._RUNNER", short)

    parts = run(GGUF, file, ids, VOCABULARY)

    assert whole.tokens == parts.tokens == 80
    assert np.abs(whole.log_probabilities - parts.log_probabilities).max() < 3e-4


def test_rows_are_log_probabilities(file: Path) -> None:
    found = run(GGUF, file, ids_of(VOCABULARY).numpy(), VOCABULARY).log_probabilities

    assert np.abs(np.exp(found.astype(np.float64)).sum(axis=-1) - 1).max() < 1e-5


def test_a_library_with_other_structures_is_not_called(tmp_path: Path, file: Path) -> None:
    changed = tmp_path / "run.py"
    source = Path(runner.__file__).read_text(encoding="utf-8")
    changed.write_text(source.replace('("further", c_void_p),', ""), encoding="utf-8")
    ids = tmp_path / "ids.npy"
    np.save(ids, ids_of(VOCABULARY).numpy())

    done = subprocess.run(
        [sys.executable, "-P", str(changed), str(file), str(ids), str(tmp_path / "out.npy")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "other structures than expected" in done.stderr
    assert "constraints.txt" in done.stderr


def test_the_runner_needs_nothing_of_this_project(tmp_path: Path) -> None:
    source = Path(runner.__file__).read_text(encoding="utf-8")

    assert "ssm_mp" not in source
    assert "import torch" not in source
