"""Every block of code in the README and in docs/ is loaded, run or read; those that are not run say why not."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from search.base.errors import StudyError
from search.cli.answers import launched
from search.problem.spec import StudySpec, load_spec
from ssm_mp.checkpoints import wrappers
from ssm_mp.components import find_components
from ssm_mp.errors import PrecisionMapError
from ssm_mp.families import registry
from ssm_mp.families.family import Family
from ssm_mp.precision_map import PrecisionMap, read_rules
from tests.docs.lines import WrongLineError, check_line, lines_of
from tests.docs.newcomer import Newcomer
from tests.docs.pages import NOW, Block, Page, page
from tests.tiny import HUGGING_FACE, random_model

BLOCKS = [block for found in NOW.values() for block in found.blocks]
SHELL, TOML, PYTHON, PRINTED = (
    [block for block in BLOCKS if block.language == language] for language in ("sh", "toml", "python", "text")
)
LINES = {line: block for block in SHELL for line in lines_of(block)}
"""Every command line of the blocks, once."""

RUN = (
    ".venv/bin/ssm-mp inspect path/to/model.safetensors",
    ".venv/bin/ssm-mp init path/to/model.safetensors --text path/to/text.txt --out studies/mine.toml",
    ".venv/bin/ssm-mp search studies/mine.toml",
    ".venv/bin/ssm-mp export studies/mine.toml --out exports/mine",
    "ssm-mp inspect path/to/model.safetensors",
    "ssm-mp formats path/to/model",
    "ssm-mp init path/to/model --text path/to/text.txt",
    "ssm-mp search model.toml --dry-run",
    "ssm-mp export studies/mine.toml --format mlx --out exports/mine-mlx",
    "ssm-mp export studies/mine.toml --format gguf --out mine.gguf",
    "ssm-mp transfer exports/mine --format mlx --out mine-mlx",
    "ssm-mp generate exports/reference --study studies/reference.toml --prompt 'def read_lines(path):' --tokens 40 "
    "--compare",
    "ssm-mp drift exports/reference --study studies/reference.toml --out drift.png",
    "ssm-mp launch studies/mine.toml --workers 8 --dry-run",
)  # fmt: skip
"""Run one after another, as a newcomer would, on a tiny model in an empty folder."""

NOT_RUN = {
    "make install": "every run of the tests began with it",
    ".venv/bin/ssm-mp report studies/mine.toml --open": "opens a browser; tests/search/results/page",
    "ssm-mp report studies/mine.toml --open": "opens a browser; tests/search/results/page",
    "ssm-mp report studies/mine.toml --serve": "serves until it is interrupted; tests/search/run/test_serving.py",
    "make search": "minutes; its two commands are run here on a tiny model",
    "make test": "it is what runs this",
    ".venv/bin/ssm-mp search studies/reference-cumulative.toml --set search.probe=none": "minutes on the reference",
    ".venv/bin/ssm-mp search studies/hybrid.toml --trials 32": "minutes on the hybrid",
    ".venv/bin/ssm-mp search studies/hybrid-cumulative.toml": "an hour on the hybrid",
    "ssm-mp search studies/hybrid-runtime.toml --target gguf": "minutes; tests/test_hybrid_targets.py",
    "ssm-mp search studies/hybrid-runtime.toml --target mlx": "minutes; tests/test_hybrid_targets.py",
    "ssm-mp search studies/hybrid-runtime.toml --target compressed-tensors": "minutes; tests/test_hybrid_targets.py",
    "ssm-mp search studies/hybrid-runtime.toml --target onnx": "minutes; tests/test_hybrid_targets.py",
    "ssm-mp launch studies/mine.toml --workers 8": "needs Slurm; tests/cluster",
}
"""Lines that are only held against the command line, and why."""

MADE_BY_A_RUN = {
    ("docs/decoding.md", "def read_lines(path):"): "what the reference writes, and how fast one machine was",
    ("docs/decoding.md", "128 windows of 128 tokens"): "what the reference's drift was on one Python's library",
}
"""Printed blocks that no test can make again, and why: page and first line."""


def test_every_block_says_what_it_is_written_in() -> None:
    assert [block.where for block in BLOCKS if block.language not in {"sh", "toml", "python", "text"}] == []
    assert [name for name, found in NOW.items() if found.text.count("```") != 2 * len(found.blocks)] == []


@pytest.mark.parametrize("line", LINES)
def test_what_a_line_names_exists(line: str) -> None:
    check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "ssm-mp search", "ssm-mp search studies/gone.toml", "ssm-mp search studies/mine.toml --trials many",
        "ssm-mp evaluate exports/mine --study studies/mine.toml --split test", "cp studies/gone.toml studies/mine.toml",
        "rm -r runs", "make all", "ssm-mp generate exports/mine",
    ],
)  # fmt: skip
def test_a_line_that_would_fail_is_found(line: str) -> None:
    with pytest.raises(WrongLineError):
        check_line(line)


def test_every_line_is_run_or_says_why_not() -> None:
    assert set(LINES) == {*RUN, *NOT_RUN}
    assert not set(RUN) & set(NOT_RUN)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"))


@pytest.mark.slow
def test_the_lines_of_the_readme_and_of_docs_do_what_they_say(
    newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(newcomer.folder)
    for line in RUN:
        newcomer.run(line)
    for made in ("runs/mine/report.md", "exports/mine/model.safetensors", "mine-mlx/config.json", "drift.png"):
        assert (newcomer.folder / made).stat().st_size > 0
    said = {code.rstrip("/") for code in page("docs/report.md").codes}
    assert {path.name for path in (newcomer.folder / "runs" / "mine").iterdir()} - said == set()


def loaded(block: Block, folder: Path) -> StudySpec | PrecisionMap:
    """A block as the study that it is part of, or as a map of a tiny model; raises where it is neither."""
    content = tomllib.loads(block.text)
    file = folder / "block.toml"
    if all(isinstance(value, dict) for value in content.values()):
        whole = "" if "checkpoint" in content else '[checkpoint]\npath = "model"\n'
        file.write_text(whole + block.text, encoding="utf-8")
        return load_spec(file)
    file.write_text(block.text, encoding="utf-8")
    return PrecisionMap.from_rules(read_rules(file), find_components(random_model(HUGGING_FACE)))


@pytest.mark.parametrize("block", TOML, ids=lambda block: block.where)
def test_toml_is_a_study_or_a_map(block: Block, tmp_path: Path) -> None:
    loaded(block, tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[search]\ntrails = 3\n", StudyError),
        ('[precision]\nchoices = ["fp16", "int9"]\n', StudyError),
        ('"*" = "fp16"\n"layers.*.q_proj" = "int8"\n', PrecisionMapError),
    ],
)
def test_toml_that_would_be_refused_is_found(text: str, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        loaded(Block("docs/some.md", 1, "toml", text), tmp_path)


def test_python_of_the_page_on_python_runs(newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newcomer.folder)
    (block,) = page("docs/python.md").blocks
    found = executed(block)
    assert found["longer"].shape == (1, 3 + 32)
    assert found["read"].position == 3 + 1


def test_the_family_of_the_page_on_families_is_read_converted_and_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file, trial = page("docs/adding-a-family.md").blocks
    family: Family = executed(file)["RippleFamily"]()
    monkeypatch.setitem(registry.FAMILIES, family.word, family)  # what its line in `_ALL` does
    monkeypatch.setattr(wrappers, "MARK", f"(?:{registry.MARK}|{family.mark})")
    assert executed(trial)["model"].config.family == family.word


def test_all_python_is_executed() -> None:
    assert {block.page for block in PYTHON} == {"docs/python.md", "docs/adding-a-family.md"}


def executed(block: Block) -> dict[str, Any]:
    """The names that a block of Python has bound in the end."""
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
    return names


def test_what_was_printed_says_why_it_is_not_made_again() -> None:
    told = {(block.page, block.text.splitlines()[0]) for block in PRINTED}
    assert told == {*MADE_BY_A_RUN, ("docs/slurm.md", "prepare  4711")}


def test_what_launch_prints_is_what_the_page_shows() -> None:
    (shown,) = (block.text for block in page("docs/slurm.md").blocks if block.language == "text")
    jobs = {"prepare": 4711, "search": 4712, "finish": 4713}
    status, cancel = "ssm-mp status studies/mine.toml", "scancel 4711 4712 4713"
    answer = {"jobs": jobs, "workers": 8, "logs": "runs/mine/logs", "status": status, "cancel": cancel}
    assert shown == launched(answer) + "\n"


def test_blocks_are_found_where_they_begin() -> None:
    found = Page("a.md", "one\n\n```sh\nmake test  # all\n```\n\n```\nprinted\n```\n").blocks
    assert [(block.line, block.language, block.text) for block in found] == [
        (3, "sh", "make test  # all\n"), (7, "", "printed\n"),
    ]  # fmt: skip
    assert [re.sub(r"\s", " ", line) for line in lines_of(found[0])] == ["make test"]
