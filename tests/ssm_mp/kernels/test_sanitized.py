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
from tests.ssm_mp.kernels.test_emulated import AMX, emulating

FAULTS = Path(__file__).parent / "faults"
# vectors are read at any multiple of their numbers' size, which their types say: nothing has to be switched off for it
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
EMULATED = emulating(AMX)
PANELS = ("tests/ssm_mp/precisions/test_many.py", "tests/ssm_mp/precisions/test_head.py")  # what has such instructions
CALLS = "tests/ssm_mp/kernels/test_calls.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not builds.found("gcc"), reason="needs gcc's sanitizers under Linux"),
]


def run_sanitized(
    folder: Path, options: tuple[str, ...], tests: tuple[str, ...], **more: str
) -> tuple[int, str]:  # fmt: skip
    """Exit status of the tests on kernels compiled with these options, and what they and the sanitizers say."""
    said = folder / "said"
    environment = more | {
        "LD_PRELOAD": " ".join(map(_library, ("libasan.so", "libstdc++.so"))),
        # leaks: Python and torch keep memory to the end; log: pytest holds back what is written while a test runs
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={said}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={said}",
    }
    command = (builds.optimising_little(folder, "gcc"), *options, *SANITIZE)
    done = builds.run_tests(folder, command, tests, "fewest", **environment)
    reports = (path.read_text(errors="replace") for path in sorted(folder.glob("said*")))
    return done.returncode, done.stdout + "\n".join(reports)


def _library(name: str) -> str:
    """The path of a library of gcc's; of libasan that of its shared object, not of the text that links to it."""
    asked = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(asked.stdout.strip()).resolve())


@pytest.mark.parametrize("options", [(), EMULATED], ids=["this CPU", "emulated AMX"])
def test_no_kernel_leaves_its_arrays_or_does_what_is_undefined(tmp_path: Path, options: tuple[str, ...]) -> None:
    if options and builds.MACHINE != "x86_64":
        pytest.skip("emulates x86")
    status, said = run_sanitized(tmp_path, options, PANELS if options else builds.TESTS)
    assert status == 0, said
    assert "Sanitizer" not in said
    assert "runtime error" not in said


def test_faults_are_found(tmp_path: Path) -> None:
    faulty = ("-include", str(FAULTS / "faulty.h"))
    status, said = run_sanitized(tmp_path, faulty, ("-x", CALLS))
    assert status != 0
    assert "AddressSanitizer" in said, said
    assert "runtime error" not in said
    status, said = run_sanitized(tmp_path, faulty, ("-x", CALLS), SSM_MP_TESTS_OVERFLOW="1")
    assert status != 0
    assert "runtime error: signed integer" in said, said
