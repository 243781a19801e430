"""Kernels for CPUs with fewer instructions than this one has: the same integers, and floats that differ by rounding.

What `test_emulated.py` does for instructions that this CPU may lack.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.ssm_mp.kernels import builds

SETS = {
    "SSE2": ("-march=x86-64", ()),
    "AVX": ("-march=x86-64-v2 -mavx", ("avx",)),
    "AVX2": ("-march=x86-64-v3", ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")),
}
"""Options of compilers, and what a CPU needs for them by the names of /proc/cpuinfo."""

DIGEST = """
import hashlib
import torch
from ssm_mp.kernels.compiler import library
from ssm_mp.modules.inputs import DynamicInput, StaticInput
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.scheme import ScaleRule
assert (library() is None) == (__import__("os").environ.get("SSM_MP_KERNELS") == "off")
torch.manual_seed(3)
for k in (1, 50, 64, 333):
    values = torch.randn(9, k) * 10.0 ** torch.randint(-4, 2, (9, 1))
    for name, precision in sorted(PRECISIONS.items()):
        for suffix, array in sorted(precision.store(values, "weight", ScaleRule()).arrays().items()):
            print(k, name, suffix, hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest())
    for inputs in (DynamicInput(), StaticInput(torch.tensor([0.02], dtype=torch.float16))):
        for array in inputs(values):
            print(k, type(inputs).__name__, hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or builds.MACHINE != "x86_64", reason="needs an x86 under Linux"),
    pytest.mark.skipif(not builds.found("cc"), reason="no C compiler was found"),
]


def command(name: str) -> tuple[str, ...]:
    """The compiler for a set of instructions, which this CPU has, or the test is skipped."""
    options, needed = SETS[name]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = next(line for line in lines if line.startswith("flags")).split()
    if missing := set(needed) - set(has):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    return ("cc", "-Wno-psabi", *options.split())


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: what the first of them compiles, the others load."""
    return tmp_path_factory.getbasetemp().parent / "instruction-sets"


@pytest.mark.parametrize("name", SETS)
def test_kernels_for_fewer_instructions_pass_the_tests_of_kernels(cache: Path, name: str) -> None:
    done = builds.run_tests(cache, command(name))
    assert done.returncode == 0, done.stdout


def test_every_set_of_instructions_gives_the_same_integers(cache: Path) -> None:
    lines = {"torch": _digest(SSM_MP_KERNELS="off"), "this CPU": _digest()}
    for name in SETS:
        try:
            compiler = command(name)
        except pytest.skip.Exception:
            continue
        lines[name] = _digest(CC=" ".join(compiler), XDG_CACHE_HOME=str(cache))
    for name, found in lines.items():
        assert found == lines["torch"], name


def _digest(**environment: str) -> list[str]:
    done = builds.run([sys.executable, "-c", DIGEST], **{**os.environ, **environment})
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()
