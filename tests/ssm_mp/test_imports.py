"""What needs no torch imports none, and a public name is the same thing whatever was imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ssm_mp

ROOT = Path(__file__).parents[2]
LIGHT = (
    "ssm_mp.errors",
    "ssm_mp.scheme",
    "search.base.errors",
    "search.problem.spec",
    "search.run.launch",
    "search.run.status",
    "search.cli.main",
)
SHARED_NAMES = {
    "benchmark": "evaluation",
    "calibrate": "conversion",
    "convert": "conversion",
    "drift": "evaluation",
    "evaluate": "evaluation",
}
"""Public functions that are named as the file that defines them, each with the folder of that file."""


def printed(*lines: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", LIGHT)
def test_light_files_import_no_torch(module: str) -> None:
    assert printed("import sys", f"import {module}", "print('torch' in sys.modules)") == "False"


def test_a_study_file_is_read_where_torch_cannot_be_imported() -> None:
    lines = ("import sys", "sys.modules['torch'] = None", "from search.problem.spec import load_spec")
    assert printed(*lines, "print(load_spec('studies/reference.toml').precision.scheme.activations)") == "static"


def test_a_name_that_needs_torch_says_so_where_torch_cannot_be_imported() -> None:
    lines = ("import sys", "sys.modules['torch'] = None", "import ssm_mp", "try:", "    ssm_mp.convert")
    assert "torch" in printed(*lines, "except ImportError as error:", "    print(error)")


@pytest.mark.parametrize("name", SHARED_NAMES)
@pytest.mark.parametrize("before", ["import {file}", "from ssm_mp import {name}; import {file}"])
def test_a_public_function_wins_over_its_file(name: str, before: str) -> None:
    file = f"ssm_mp.{SHARED_NAMES[name]}.{name}"
    lines = (before.format(name=name, file=file), f"from ssm_mp import {name}", "import ssm_mp, sys")
    found = printed(*lines, f"print({name} is ssm_mp.{name} is sys.modules['{file}'].{name}, callable({name}))")
    assert found == "True True"


@pytest.mark.parametrize("name", SHARED_NAMES)
def test_a_shared_name_can_still_be_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssm_mp, name, len)
    assert getattr(ssm_mp, name) is len


def test_every_public_name_is_defined_by_the_package() -> None:
    origins = {name: getattr(ssm_mp, name).__module__.split(".")[0] for name in ssm_mp.__all__}
    assert origins == dict.fromkeys(ssm_mp.__all__, "ssm_mp")


def test_a_star_import_gives_every_public_name() -> None:
    assert printed("from ssm_mp import *", "import ssm_mp", "print(set(ssm_mp.__all__) - set(globals()))") == "set()"


def test_dir_lists_the_public_names_before_they_are_loaded() -> None:
    assert printed("import ssm_mp", "print(set(ssm_mp.__all__) - set(dir(ssm_mp)))") == "set()"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ssm_mp' has no attribute 'convrt'"):
        _ = ssm_mp.convrt  # type: ignore[attr-defined]
