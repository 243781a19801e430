"""The tests of kernels under AddressSanitizer and UndefinedBehaviorSanitizer: nothing is read or written outside of an
array, and nothing that C leaves undefined is done.

Memory of tensors comes from an allocator that the sanitizer replaces, so each array ends at its last byte. Python
itself is not compiled for it, so the runtime is loaded before everything else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ssm_mp.kernels import builds
from tests.ssm_mp.kernels.test_emulated import AMX, MANY, emulating

FAULTS = Path(__file__).parent / "faults"
# vectors are read at any multiple of their numbers' size, which their types say: nothing has to be switched off for it
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
EMULATED = emulating(AMX)
CALLS = "tests/ssm_mp/kernels/test_calls.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not builds.found("gcc"), reason="needs gcc's sanitizers under Linux"),
]


def run_sanitized(folder: Path, options: tuple[str, ...], tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status of the tests on kernels compiled with these options, and what they and the sanitizers say."""
    said = folder / "said"
    environment = {
        "LD_PRELOAD": " ".join(map(_library, ("libasan.so", "libstdc++.so"))),
        # leaks: Python and torch keep memory to the end; log: pytest holds back what is written while a test runs
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={said}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={said}",
    }
    done = builds.run_tests(folder, (_compiler(folder), *options, *SANITIZE), tests, **environment)
    reports = (path.read_text(errors="replace") for path in sorted(folder.glob("said*")))
    return done.returncode, done.stdout + "\n".join(reports)


def _compiler(folder: Path) -> str:
    """gcc, optimising little whatever it is told before: with what the sanitizers add, it takes minutes over a file."""
    script = folder / "gcc"
    script.write_text('#!/bin/sh\nexec gcc "$@" -O1\n')
    script.chmod(0o755)
    return str(script)


def _library(name: str) -> str:
    """The path of a library of gcc's; of libasan that of its shared object, not of the text that links to it."""
    asked = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(asked.stdout.strip()).resolve())


@pytest.mark.parametrize("options", [(), EMULATED], ids=["this CPU", "emulated AMX"])
def test_no_kernel_leaves_its_arrays_or_does_what_is_undefined(tmp_path: Path, options: tuple[str, ...]) -> None:
    if options and builds.MACHINE != "x86_64":
        pytest.skip("emulates x86")
    status, said = run_sanitized(tmp_path, options, MANY if options else builds.TESTS)
    assert status == 0, said
    assert "Sanitizer" not in said
    assert "runtime error" not in said


@pytest.mark.parametrize(
    ("fault", "found"), [("copies_too_much.h", "AddressSanitizer"), ("overflows.h", "runtime error: signed integer")]
)
def test_a_fault_is_found(tmp_path: Path, fault: str, found: str) -> None:
    status, said = run_sanitized(tmp_path, ("-include", str(FAULTS / fault)), ("-x", CALLS))
    assert status != 0
    assert found in said, said
