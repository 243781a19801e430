"""What is installed from a wheel is whole: a command, the kernels' sources, the templates; far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_OF = ("pyproject.toml", "README.md", "ssm_mp", "search")

COMPUTED = """
import pathlib, sys
import search, ssm_mp
from ssm_mp.kernels.calls import compiled
for package in (search, ssm_mp):
    assert pathlib.Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
print(compiled())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout installs."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in BUILT_OF:  # a copy: building leaves files beside the sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir",
         str(folder), str(folder / "source")],
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def ran(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, encoding="utf-8",
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_file_that_is_no_code_is_in_the_wheel(installed: Path) -> None:
    for package in ("ssm_mp", "search"):
        held, there = (
            {
                path.relative_to(root).as_posix()
                for path in (root / package).rglob("*")
                if path.is_file() and path.suffix != ".pyc"
            }
            for root in (ROOT, installed)
        )
        assert held == there


@pytest.mark.slow
def test_the_command_answers_outside_of_a_checkout(installed: Path) -> None:
    entry = (installed / f"ssm_mp-{version('ssm-mp')}.dist-info" / "entry_points.txt").read_text(encoding="utf-8")
    assert "ssm-mp = ssm_mp.start:main" in entry
    for command in (("-m", "ssm_mp"), ("-c", "from ssm_mp.start import main; main()")):
        done = ran(installed, *command, "--version")
        assert done.stdout == f"ssm-mp {version('ssm-mp')}\n", done.stderr
    assert "Start with:  ssm-mp init" in ran(installed, "-m", "ssm_mp", "--help").stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_kernels_are_compiled_from_what_is_installed(installed: Path) -> None:
    done = ran(installed, "-c", COMPUTED, str(installed))
    assert done.stdout == "True\n", done.stderr
