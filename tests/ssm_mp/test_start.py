"""The command begins with its own packages, whatever else is called `search` or `ssm_mp`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from search.base.command import COMMAND
from tests.tiny import write_study

ROOT = Path(__file__).parents[2]
AS_INSTALLED = (sys.executable, "-P", "-c", "import sys\nfrom ssm_mp.start import main\nsys.exit(main())")
"""What the script that pip writes does."""
AS_MODULE = (sys.executable, "-P", "-m", "ssm_mp")
OWN_WORDS = "Find the smallest mixed-precision version"


def ran(
    command: tuple[str, ...], *arguments: str, cwd: Path, path: tuple[Path | str, ...]
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def shadowed(folder: Path, kind: str, name: str) -> None:
    """Something of the user's that has the name of one of our packages."""
    if kind == "file":
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the user')\n", encoding="utf-8")
    else:
        (folder / name).mkdir()
    if kind == "package":
        (folder / name / "__init__.py").touch()
        (folder / name / "cli.py").write_text("raise SystemExit('a file of the user')\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["file", "package", "folder"])
@pytest.mark.parametrize("command", [AS_INSTALLED, AS_MODULE, COMMAND])
def test_a_search_of_the_users_takes_no_place(tmp_path: Path, command: tuple[str, ...], kind: str) -> None:
    shadowed(tmp_path, kind, "search")
    for path in ((tmp_path, ROOT), (".", ROOT), ("", ROOT)):
        done = ran(command, "--help", cwd=tmp_path, path=path)
        assert OWN_WORDS in done.stdout, done.stderr
        assert "ssm-mp [OPTIONS] COMMAND" in done.stdout


@pytest.mark.parametrize("name", ["search", "ssm_mp"])
def test_other_processes_are_started_where_no_name_counts(tmp_path: Path, name: str) -> None:
    shadowed(tmp_path, "file", name)
    assert OWN_WORDS in ran(COMMAND, "--help", cwd=tmp_path, path=(tmp_path,)).stdout


def test_what_was_imported_before_under_the_name_is_put_away(tmp_path: Path) -> None:
    shadowed(tmp_path, "package", "search")
    before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport search\nfrom ssm_mp.start import main\nmain()"
    done = ran((sys.executable, "-P", "-c", before), "--help", cwd=tmp_path, path=(ROOT,))
    assert OWN_WORDS in done.stdout, done.stderr


def test_an_installation_without_its_search_is_said_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ssm_mp", tmp_path / "ssm_mp", ignore=shutil.ignore_patterns("__pycache__"))
    done = ran(AS_INSTALLED, "--help", cwd=tmp_path, path=(tmp_path,))
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'search'} is missing, which belongs to {tmp_path / 'ssm_mp' / 'start.py'}; "
        "install ssm-mp again"
    ]


def test_a_file_in_the_place_of_ssm_mp_is_named(tmp_path: Path) -> None:
    (tmp_path / "ssm_mp.py").touch()
    done = ran((sys.executable, "-P", "-c", "import search.problem.spec"), cwd=tmp_path, path=(tmp_path, ROOT))
    assert f"{tmp_path / 'ssm_mp.py'} is found as ssm_mp" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_workers_start_beside_a_search_of_the_users(tmp_path: Path) -> None:
    write_study(tmp_path, windows=(4, 32, 32), extra="[search]\nbudget_percent = 8\nseeds = 4\ntrials = 6\n")
    shadowed(tmp_path, "file", "search")
    done = ran(AS_INSTALLED, "search", "tiny.toml", "--workers", "2", cwd=tmp_path, path=(tmp_path, ROOT))
    assert done.returncode == 0, done.stderr
    assert "ended with code" not in done.stderr
