"""Kernels for instructions that this CPU may lack, compiled against `emulated/`, which computes them in plain C.

The tests of what these kernels compute run once more on them, in a process of their own. What
`test_instruction_sets.py` does for CPUs that lack what this one has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ssm_mp.kernels import builds

FOLDER = Path(__file__).parent / "emulated"
MANY = (
    "tests/ssm_mp/precisions/test_matrix.py",
    "tests/ssm_mp/precisions/test_many.py",
    "tests/ssm_mp/precisions/test_head.py",
    "tests/ssm_mp/programs/test_branch.py",
)
"""Those of products, which take most of these instructions."""
OTHERS = (
    "tests/ssm_mp/kernels/test_scan.py",
    "tests/ssm_mp/kernels/test_ssd.py",
    "tests/ssm_mp/kernels/test_gated_norm.py",
    "tests/ssm_mp/precisions/test_slices.py",
)

AVX_VNNI = ("AVXVNNI",)
AVX512 = ("AVX512F", "AVX512BW", "AVX512DQ")
VNNI = (*AVX512, "AVX512VNNI")
AMX = (*VNNI, "AMX_TILE", "AMX_INT8", "AMX_BF16")


def emulating(instructions: tuple[str, ...]) -> tuple[str, ...]:
    """Options of a compiler; what this CPU has of these instructions does not get in the way."""
    said = (f"-D__{name}__=1" for name in instructions)
    return ("-mno-avx512f", "-mno-avxvnni", "-mno-amx-tile", f"-I{FOLDER}", "-Wno-psabi", *said)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or builds.MACHINE != "x86_64", reason="emulates x86 under Linux")
@pytest.mark.skipif(not builds.found("cc"), reason="no C compiler was found")
@pytest.mark.parametrize(
    ("instructions", "tests", "integers", "floats"),
    [
        (AVX_VNNI, MANY, False, False),
        (AVX512, MANY, False, False),
        (VNNI, (*MANY, *OTHERS), True, False),
        (AMX, (*MANY, *OTHERS), True, True),
    ],
    ids=["avx-vnni", "avx512", "vnni", "amx"],
)
def test_kernels_for_other_cpus_pass_the_tests_of_kernels(
    tmp_path: Path, instructions: tuple[str, ...], tests: tuple[str, ...], integers: bool, floats: bool
) -> None:
    done = builds.run_tests(
        tmp_path, (builds.optimising_little(tmp_path, "cc"), *emulating(instructions)), ("-rs", *tests)
    )
    assert f"integers by VNNI {integers}, floats by AMX {floats}\n" in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout, done.stdout
