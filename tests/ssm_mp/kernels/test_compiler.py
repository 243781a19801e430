"""Where there is no compiler, or a broken one, torch computes the same, and says so once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_mp.kernels.compiler import library

SCRIPT = """
import torch
from ssm_mp import evaluate
from ssm_mp.kernels import calls
from tests.tiny import MAMBA, random_model, some_windows
torch.set_num_threads(1)
for _ in range(2):
    print(calls.compiled(), f"{evaluate(random_model(MAMBA), some_windows()).perplexity:.4f}")
"""


def _run(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    held = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=held, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_the_machine_that_tests_run_on_has_kernels() -> None:
    assert library() is not None, "install a C compiler: without one these tests compare torch with itself"


@pytest.mark.slow
def test_the_library_is_compiled_once_and_then_found_in_the_cache(tmp_path: Path) -> None:
    first = _run(tmp_path)
    (kept,) = (tmp_path / "cache" / "ssm-mp").iterdir()
    written = kept.stat().st_mtime_ns
    assert _run(tmp_path, PATH=os.environ["PATH"]).stdout == first.stdout
    assert kept.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "echo"])
def test_without_a_compiler_results_agree_and_it_is_said_once(tmp_path: Path, compiler: str) -> None:
    expected, found = _run(tmp_path), _run(tmp_path, CC=compiler)
    assert found.stderr.count("note: computing without compiled kernels") == 1
    assert expected.stderr == ""
    assert [line.split()[0] for line in expected.stdout.splitlines()] == ["True", "True"]
    assert found.stdout == expected.stdout.replace("True", "False")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
def test_kernels_for_narrower_vectors_give_the_same(tmp_path: Path) -> None:
    assert _run(tmp_path, CC="cc -mno-avx512f").stdout == _run(tmp_path).stdout


@pytest.mark.slow
def test_kernels_can_be_switched_off_silently(tmp_path: Path) -> None:
    done = _run(tmp_path, SSM_MP_KERNELS="off")
    assert done.stdout.startswith("False")
    assert done.stderr == ""


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert _run(tmp_path).stdout.startswith("True")
