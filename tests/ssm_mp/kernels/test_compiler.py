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
from ssm_mp.conversion.convert import Converter
from ssm_mp.kernels import calls
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import MAMBA, random_model, some_windows
torch.set_num_threads(1)
model = random_model(MAMBA)
for _ in range(2):
    print(calls.compiled(), f"{evaluate(model, some_windows()).perplexity:.4f}")
converter = Converter(model, Scheme(activations="dynamic"))
for precision in ("int8", "fp16"):
    held = converter.convert(PrecisionMap.uniform(precision, converter.components))
    print(calls.compiled(), f"{evaluate(held, some_windows()).perplexity:.2f}")  # rounding to int8 amplifies rounding
"""


THREADS = """
from threading import Barrier, Thread
from ssm_mp.kernels.compiler import library
together = Barrier(8)
threads = [Thread(target=lambda: (together.wait(), library())) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def _run(tmp_path: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    held = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", before + SCRIPT], capture_output=True, text=True, env=held, check=False
    )
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
    assert [line.split()[0] for line in expected.stdout.splitlines()] == ["True"] * 4
    assert found.stdout == expected.stdout.replace("True", "False")


@pytest.mark.slow
def test_threads_that_ask_at_once_are_told_once(tmp_path: Path) -> None:
    assert _run(tmp_path, THREADS, CC="false").stderr.count("note: ") == 1


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx512vnni", "-mno-amx-tile"])
def test_kernels_for_cpus_with_fewer_instructions_give_the_same(tmp_path: Path, without: str) -> None:
    assert _run(tmp_path, CC=f"cc {without}").stdout == _run(tmp_path).stdout


@pytest.mark.slow
def test_a_compiler_without_openmp_is_a_compiler_too(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -fopenmp "*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    found = _run(tmp_path, CC=str(compiler))
    assert found.stdout == _run(tmp_path).stdout
    assert found.stderr.count("note: kernels compiled without OpenMP, in one thread each: ") == 1
    assert "no OpenMP" in found.stderr


def stand_in(folder: Path, *refused: str) -> Path:
    """A compiler that refuses some options, and writes down those that it was given."""
    patterns = " | ".join(f'*" {option} "*' for option in refused)
    compiler = folder / "cc"
    compiler.write_text(
        f"""#!/bin/sh
echo "$*" >>{folder}/given
case " $* " in {patterns}) echo "error: unknown value 'native'" >&2; exit 1;; esac
exec cc "$@"
"""
    )
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
def test_a_compiler_that_does_not_know_this_cpu_compiles_for_any_and_that_is_said_once(tmp_path: Path) -> None:
    found = _run(tmp_path, CC=str(stand_in(tmp_path, "-march=native")))
    assert found.stdout == _run(tmp_path).stdout
    assert found.stderr.count("note: kernels compiled for any CPU of this kind") == 1
    assert found.stderr.count("\n") == 1
    assert "unknown value 'native'" in found.stderr
    assert not any("native" in line for line in (tmp_path / "given").read_text().splitlines()[1:])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler behind is one for x86")
@pytest.mark.parametrize("refused", ["-mcpu=native", "-march=native"])
def test_on_arm_the_option_that_the_compiler_knows_is_taken(tmp_path: Path, refused: str) -> None:
    arm = "import platform\nplatform.machine = lambda: 'arm64'\n"
    assert _run(tmp_path, arm, CC=str(stand_in(tmp_path, refused))).stdout == _run(tmp_path).stdout
    (known,) = {"-mcpu=native", "-march=native"} - {refused}
    compiled = [line for line in (tmp_path / "given").read_text().splitlines() if " -c " in line]
    assert compiled
    assert all(f" {known} " in line and refused not in line for line in compiled)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
def test_a_cpu_that_the_command_names_is_compiled_for(tmp_path: Path) -> None:
    named = f"{stand_in(tmp_path, '-march=native')} -march=x86-64"
    found = _run(tmp_path, CC=named)
    assert found.stdout == _run(tmp_path).stdout
    assert found.stderr == ""


@pytest.mark.slow
def test_kernels_can_be_switched_off_silently(tmp_path: Path) -> None:
    done = _run(tmp_path, SSM_MP_KERNELS="off")
    assert done.stdout.startswith("False")
    assert done.stderr == ""


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert _run(tmp_path).stdout.startswith("True")
