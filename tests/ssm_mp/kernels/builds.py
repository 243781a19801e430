"""The tests of kernels, run once more in a process of their own on kernels that were compiled in another way."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_mp.kernels import compiler

ROOT = Path(__file__).parents[3]
MACHINE = platform.machine()
SOURCES = ROOT / "ssm_mp" / "kernels"
_NOT_THESE = ("cuda", "triton", "mamba_ssm", "compiler", "library_cache", "families")
_OTHER_TESTS = ("precisions/test_compensate.py", "precisions/test_head.py", "precisions/test_many.py",
                "precisions/test_matrix.py", "precisions/test_slices.py", "conversion/test_one_pass.py")  # fmt: skip
# what has no calls of kernels that other tests do not have, or computes without kernels, slowly
_NOTHING_NEW = ("threads_change", "gives_what_the_modules", "between_multipliers", "decodes_in_compiled_calls",
                "its_own_sequence")  # fmt: skip
_LEFT_OUT = (*_NOTHING_NEW, "[reference", "[chunked", "mse-False", "no_float32_copy",
             "(test_compensate and not the_kernel)", "(test_one_pass and not the_kernel)")  # fmt: skip
_FOLDERS = (("kernels", "test_*.py"), ("blocks", "test_*compiled*.py"), ("decoding", "test_comp*.py"),
            ("programs", "test_*.py"))  # fmt: skip
TESTS = tuple(
    str(path.relative_to(ROOT))
    for folder, pattern in _FOLDERS
    for path in sorted((ROOT / "tests" / "ssm_mp" / folder).glob(pattern))
    if not any(name in path.name for name in _NOT_THESE)
) + tuple(f"tests/ssm_mp/{name}" for name in _OTHER_TESTS)
"""Those that compute with the kernels of a CPU; those of them that are slow start processes, and are left out."""
ELSEWHERE = tuple(name for name in TESTS if "compiled" not in name or "compiled_blocks" in name)
"""Those for kernels that take long: of blocks the contract."""

SCRIPT = """
import sys
import pytest
from hypothesis import settings
from ssm_mp.kernels.compiler import library
from ssm_mp.kernels.matrices import has_vnni, multiplies_by_amx
assert library() is not None
print(f"integers by VNNI {has_vnni()}, floats by AMX {multiplies_by_amx()}", flush=True)
settings.register_profile("few", deadline=None, max_examples=12)
settings.register_profile("fewest", deadline=None, max_examples=4)
sys.exit(pytest.main(sys.argv[1:]))
"""


def options(profile: str) -> list[str]:
    """Of pytest; profile: of hypothesis, one of `SCRIPT`'s."""
    chosen = " and ".join(f"not {name}" for name in _LEFT_OUT)
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return [*quiet, "-m", "not slow", "-k", chosen, f"--hypothesis-profile={profile}"]


def run_tests(
    cache: Path, command: Sequence[str], tests: Sequence[str] = TESTS, profile: str = "few", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Tests on the kernels that a compiler's command makes, which are kept in a folder of their own."""
    held = {**os.environ, "CC": shlex.join(command), "XDG_CACHE_HOME": str(cache), **environment}
    return run([sys.executable, "-c", SCRIPT, *options(profile), *tests], **held)


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the folder of the repository, and all that it says."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def build(command: Sequence[str], to: Path, *sources: Path) -> Path:
    """A library of C files, those of all kernels where none are named, by this compiler and without OpenMP.

    Options behind the compiler's name come last, so that they may say otherwise than the project's own."""
    files = sources or tuple(sorted(SOURCES.glob("*.c")))
    compiled = [command[0], *compiler.FLAGS, *command[1:], "-shared", *map(str, files), "-lm", "-o", str(to)]
    done = run(compiled)
    assert done.returncode == 0, done.stdout
    return to


def optimising_little(folder: Path, compiler_name: str) -> str:
    """The compiler, a quarter as long over a file whatever it is told before: with what sanitizers add, or emulated
    instructions, it would take minutes."""
    script = folder / compiler_name
    script.write_text(f'#!/bin/sh\nexec {compiler_name} "$@" -O1\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def found(compiler_name: str) -> str:
    """The path of a compiler or another program; empty where there is none."""
    return shutil.which(compiler_name) or ""
