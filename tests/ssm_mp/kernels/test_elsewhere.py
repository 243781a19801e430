"""The tests of kernels on kernels that another process computes: under valgrind, and on an emulated ARM.

Under valgrind no kernel reads or writes outside of its arrays, or decides by what nobody has written. On ARM the
numbers are those of the references within the tolerances that hold here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import debian
from tests.ssm_mp.kernels import builds
from tests.ssm_mp.kernels.elsewhere import Elsewhere
from tests.ssm_mp.kernels.memory import UNSET, Memory

HERE = Path(__file__).parent
OPTIONS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-rdynamic")
VALGRIND_KNOWS = "-march=x86-64-v3"  # no AVX-512
QUICK = "-O1"  # what is compiled for minutes otherwise
ARM = "-march=armv8.2-a+dotprod"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
CALLS = "tests/ssm_mp/kernels/test_calls.py"
PRODUCTS = ("tests/ssm_mp/precisions/test_matrix.py", "tests/ssm_mp/precisions/test_many.py")
ARM_COMPILERS = {
    "gcc": (("aarch64-linux-gnu-gcc",), builds.ELSEWHERE),
    "clang": (("clang", "--target=aarch64-linux-gnu", QUICK), (CALLS, *PRODUCTS)),
}
"""Both, and the tests on what they compile: those that depend on a compiler, where it is the second one."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not builds.found("cc"), reason="needs a C compiler under Linux"),
]


def require(packages: Sequence[str], binaries: Sequence[str]) -> None:
    """Install packages; where that is impossible the test is skipped aloud."""
    try:
        debian.install(packages, binaries)
    except debian.NotInstallableError as error:
        warnings.warn(f"KERNELS WERE NOT TESTED ELSEWHERE: {error}", stacklevel=2)
        pytest.skip(f"KERNELS WERE NOT TESTED ELSEWHERE: {error}")


def valgrind(folder: Path) -> tuple[str, ...]:
    """The command that watches over a driver."""
    if builds.MACHINE != "x86_64":
        pytest.skip("compiles for x86")
    require(debian.VALGRIND_PACKAGES, debian.VALGRIND_BINARIES)
    return (debian.program("valgrind"), "--quiet", "--error-exitcode=9", f"--log-file={folder / 'log'}")


def driver(compiler: Sequence[str], folder: Path) -> str:
    """The driver, compiled."""
    done = builds.run([*compiler, *OPTIONS, str(HERE / "driver.c"), "-o", str(folder / "driver"), "-ldl"])
    assert done.returncode == 0, done.stdout
    return str(folder / "driver")


def run_elsewhere(
    folder: Path, compiler: Sequence[str], options: Sequence[str], emulator: Sequence[str], *tests: str
) -> tuple[int, str]:
    """The status of tests on kernels that are compiled with these options, and what they say."""
    library = builds.build([*compiler, *options], folder / "kernels.so")
    command = [*emulator, driver(compiler, folder)]
    module = "tests.ssm_mp.kernels.elsewhere"
    done = builds.run([sys.executable, "-m", module, str(library), str(folder / "log"), *command, "--", *tests])
    return done.returncode, done.stdout


def test_under_valgrind_no_kernel_leaves_its_arrays_or_reads_what_was_not_written(tmp_path: Path) -> None:
    watched = valgrind(tmp_path)
    status, said = run_elsewhere(tmp_path, ("cc",), (VALGRIND_KNOWS, QUICK), watched, *builds.ELSEWHERE)
    assert status == 0, said


@pytest.mark.parametrize("compiler", ARM_COMPILERS)
def test_on_arm_kernels_compute_what_the_references_do(tmp_path: Path, compiler: str) -> None:
    command, tests = ARM_COMPILERS[compiler]
    require(debian.ARM_PACKAGES, debian.ARM_BINARIES)
    if not builds.found(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    emulator = (debian.program("qemu-aarch64"), "-L", ARM_LIBRARIES)
    status, said = run_elsewhere(tmp_path, command, (ARM,), emulator, *tests)
    assert status == 0, said


@pytest.mark.parametrize("watched", [True, False], ids=["valgrind", "guarded"])
def test_copies_of_too_much_are_found(tmp_path: Path, watched: bool) -> None:
    watch, fault = valgrind(tmp_path) if watched else (), HERE / "faults" / "faulty.h"
    status, said = run_elsewhere(tmp_path, ("cc",), (QUICK, "-include", str(fault)), watch, "-x", CALLS)
    assert status != 0
    assert ("Invalid read of size" if watched else "a kernel wrote behind an array") in said, said


def test_a_decision_by_what_was_not_written_is_found(tmp_path: Path) -> None:
    library = builds.build(["cc"], tmp_path / "undecided.so", HERE / "faults" / "undecided.c")
    memory = Memory()
    kernels = Elsewhere([*valgrind(tmp_path), driver(["cc"], tmp_path)], library, tmp_path / "log", memory)
    count = kernels.count_magnitudes
    from ssm_mp.kernels.calls import _ARGUMENTS

    count.argtypes, count.restype = _ARGUMENTS["count_magnitudes"], None
    for content in (bytes(32), UNSET * 8):
        counts = torch.frombuffer(bytearray(content), dtype=torch.int64)
        memory.note(counts.data_ptr(), counts)
        if content == bytes(32):
            count(0, 0, None, 0, 1.0, 4, counts.data_ptr())
        else:
            with pytest.raises(AssertionError, match="depends on uninitialised value"):
                count(0, 0, None, 0, 1.0, 4, counts.data_ptr())
    assert kernels.close() == 9
