"""What the pages name in their sentences exists, and what exists is named where people look for it."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
from pydantic import BaseModel

from search.problem.spec import SAMPLERS, StudySpec
from ssm_mp.families.registry import FAMILIES
from ssm_mp.precision_map import PRESETS
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.runtimes.registry import FORMATS
from tests.docs.lines import (
    COMMANDS,
    WrongLineError,
    check_line,
    make_targets,
    options_of,
    options_of_all,
    options_of_module,
    require_path,
)
from tests.docs.pages import NOW, ROOT, Page

TOP = ("ssm_mp/", "search/", "studies/", "jobs/", "benchmarks/", "tests/", "docs/", ".ci/")
TO_WRITE = ("ssm_mp/families/ripple.py",)
"""Files that a page tells its reader to write."""
_WHOLE = re.compile(r"(?:[A-Z_]+=\S+ )?(?:python -m|pytest|pip|make|sbatch|cp) .*")


def wrong_names(page: Page) -> list[str]:
    """Paths, commands, options and modules in a page's sentences that do not exist."""
    found = []
    for code in page.codes:
        try:
            check(code)
        except WrongLineError as error:
            found.append(f"`{code}`: {error}")
    return found


def check(code: str) -> None:
    """Raise WrongLineError for code in a sentence that names what does not exist; it may be a part, with `…`."""
    if code.startswith(("ssm-mp ", ".venv/bin/ssm-mp ")):
        words = re.sub(r"[\[\]]", " ", code).split()
        known = options_of(words[1])
        unknown = [word for word in words if word.startswith("--") and word not in known]
        if unknown:
            raise WrongLineError(f"ssm-mp {words[1]} has no option {', '.join(unknown)}")
    elif _WHOLE.fullmatch(code):
        check_line(code)
    elif code.startswith("--"):
        anywhere = {option for name in COMMANDS for option in options_of(name)}
        anywhere |= benchmark_options() | options_of_all()
        unknown = [word for word in shlex.split(code) if word.startswith("--") and word not in anywhere]
        if unknown:
            raise WrongLineError(f"nothing here has an option {', '.join(unknown)}")
    elif re.fullmatch(r"[\w./-]+", code) and code.startswith(TOP) and "NAME" not in code and code not in TO_WRITE:
        require_path(code)


def benchmark_options() -> set[str]:
    return {o for path in (ROOT / "benchmarks").glob("*.py") for o in options_of_module(f"benchmarks.{path.stem}")}


@pytest.mark.parametrize("name", NOW)
def test_what_is_named_exists(name: str) -> None:
    assert wrong_names(NOW[name]) == []


@pytest.mark.parametrize(
    "code",
    [
        "ssm-mp sarch STUDY", "ssm-mp search STUDY [--trails N]", "python -m benchmarks.gone", "make tests",
        "--nowhere 3", "python -m benchmarks.oracle --gone", "pytest tests/gone", "search/cli/gone.py",
        "pip install '.[gone]'", "pip install -c gone.txt '.[gguf]'", "python -m ssm_mp sarch",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found(code: str) -> None:
    assert len(wrong_names(Page("docs/some.md", f"So `{code}` does, and `make test`."))) == 1


def test_every_command_and_no_other_is_in_the_table_of_commands() -> None:
    found = {code.split()[1] for code in NOW["docs/command-line.md"].codes if code.startswith("ssm-mp ")}
    assert found == set(COMMANDS)


def test_every_make_target_and_no_other_is_in_the_table_of_targets() -> None:
    rows = NOW["CONTRIBUTING.md"].text.partition("## Make targets")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `make (\w+)` \|", rows, re.MULTILINE)) == make_targets()


@pytest.mark.parametrize("package", ["ssm_mp", "search"])
def test_every_wing_of_a_package_has_its_row(package: str) -> None:
    rows = {code for row in NOW["CONTRIBUTING.md"].tables(f"`{package}/`") for code in re.findall(r"`([^`]+)`", row[0])}
    assert {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")} <= rows
    assert [name for name in rows if not (ROOT / package / name).exists()] == []


def test_every_precision_is_in_the_table_of_precisions() -> None:
    rows = list(NOW["docs/precisions.md"].tables("precision"))
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row[0])} == set(PRECISIONS)
    for name, precision in PRECISIONS.items():
        assert any(f"`{name}`" in row[0] and str(precision.bits) in row[1].split(", ") for row in rows), name


@pytest.mark.parametrize("name", ["README.md", "docs/checkpoints.md"])
def test_every_model_type_is_in_the_table_of_families(name: str) -> None:
    rows = {code for row in NOW[name].tables("family") for code in re.findall(r"`(\w+)`", row[1])}
    assert {kind for family in FAMILIES.values() for kind in family.model_types} - rows == set()


def test_every_sampler_preset_and_format_has_its_page() -> None:
    assert [name for name in SAMPLERS if f"`{name}`" not in NOW["docs/sampler.md"].text] == []
    assert [name for name in PRESETS if f"`{name}`" not in NOW["docs/studies.md"].text] == []
    assert [name for name in FORMATS if f"--target {name}" not in NOW["docs/formats.md"].text] == []


@pytest.mark.parametrize("section", [name for name in StudySpec.model_fields if name not in ("path", "overrides")])
def test_every_key_of_a_study_is_there_with_its_default(section: str) -> None:
    kind = StudySpec.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    rows = {row[0].strip("`"): row[1].strip("`") for row in NOW["docs/studies.md"].tables(f"`[{section}]`")}
    rows.pop("any option of `sbatch", None)
    expected = {
        name: [] if isinstance(field.default, tuple) and not field.default else field.default
        for name, field in kind.model_fields.items()
    }
    assert rows.keys() == expected.keys()
    for name, default in expected.items():
        if kind.model_fields[name].is_required():
            assert rows[name] == "", name
        elif default is None:
            assert rows[name] == "none", name
        else:
            said = tomllib.loads(f"value = {rows[name]}")["value"]
            assert said == (list(default) if isinstance(default, tuple) else default), name
