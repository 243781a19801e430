"""Kernels for instructions that this CPU may lack, compiled against `emulated/`, which computes them in plain C, and
kernels for CPUs that lack what this one has.

The tests of what these kernels compute run once more on them, in a process of their own.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_mp.kernels.compiler import library

FOLDER = Path(__file__).parent / "emulated"
TESTS = (
    "tests/ssm_mp/precisions/test_matrix.py",
    "tests/ssm_mp/precisions/test_many.py",
    "tests/ssm_mp/programs/test_branch.py",
    "tests/ssm_mp/kernels/test_scan.py",
    "tests/ssm_mp/kernels/test_ssd.py",
    "tests/ssm_mp/kernels/test_gated_norm.py",
    "tests/ssm_mp/precisions/test_slices.py",
)

EMULATING = ("-mno-avx512f", f"-I{FOLDER}")
AVX512 = ("AVX512F", "AVX512BW", "AVX512DQ")
VNNI = (*AVX512, "AVX512VNNI")
AMX = (*VNNI, "AMX_TILE", "AMX_INT8", "AMX_BF16")

SCRIPT = """
import sys
import pytest
from ssm_mp.kernels.matrices import has_vnni, multiplies_by_amx
print(f"integers by VNNI {has_vnni()}, floats by AMX {multiplies_by_amx()}", flush=True)
sys.exit(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="emulates x86 under Linux")
@pytest.mark.parametrize(
    ("instructions", "tests", "integers", "floats"),
    [(AVX512, TESTS[:2], False, False), (VNNI, TESTS, True, False), (AMX, TESTS, True, True)],
    ids=["avx512", "vnni", "amx"],
)
def test_kernels_for_other_cpus_pass_the_tests_of_kernels(
    tmp_path: Path, instructions: tuple[str, ...], tests: tuple[str, ...], integers: bool, floats: bool
) -> None:
    if library() is None:
        pytest.skip("no C compiler was found")
    own = ("-mno-avx512f", "-mno-amx-tile")  # what this CPU has of them does not get in the way
    said = (f"-D__{name}__=1" for name in instructions)
    command = ("cc", *own, f"-I{FOLDER}", "-Wno-psabi", *said)
    environment = {**os.environ, "CC": shlex.join(command), "XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *tests], capture_output=True, text=True, env=environment, cwd=root, check=False
    )
    assert f"integers by VNNI {integers}, floats by AMX {floats}\n" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="for x86 under Linux")
@pytest.mark.parametrize(
    ("flags", "told", "lacks"),
    [
        (("-mno-avx512f", "-mno-avxvnni", "-mno-amx-tile"), "__x86_64__", "__AVX512F__"),
        ((*EMULATING, "-mno-amx-tile", "-D__AVXVNNI__=1"), "__AVXVNNI__", "__AVX512F__"),
        (("-mno-avx2", "-mno-amx-tile"), "__x86_64__", "__AVX2__"),
        (("-mno-sse3", "-mno-amx-tile"), "__SSE2__", "__AVX__"),
    ],
    ids=["avx2", "avx-vnni", "avx", "sse2"],
)
def test_products_are_right_on_cpus_with_less(tmp_path: Path, flags: tuple[str, ...], told: str, lacks: str) -> None:
    if library() is None:
        pytest.skip("no C compiler was found")
    command = ("cc", *flags, "-Wno-psabi")
    asked = [*command, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert f"#define {told} " in macros
    assert f"#define {lacks} " not in macros
    environment = {**os.environ, "CC": shlex.join(command), "XDG_CACHE_HOME": str(tmp_path)}
    script = "import sys; from ssm_mp.kernels.compiler import library; sys.exit(library() is None or " + (
        "__import__('pytest').main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *TESTS[:2]],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
