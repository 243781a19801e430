"""Command lines of the pages, taken apart and held against the commands that there are."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import typer

from search.cli.main import app
from tests.docs.pages import ROOT, Block

EXAMPLES = {
    "path/to/": "the reader's own",
    "studies/mine.toml": "the reader's own",
    "studies/x.toml": "the reader's own",
    "exports/": "made by a command",
    "runs/": "made by a command",
    "mine.gguf": "made by the command",
    "mine-mlx": "made by the command",
    "drift.png": "made by the command",
    "model.toml": "made by the command before",
}
"""Beginnings of paths that the repository does not hold, and why not."""
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(_GROUP.commands)
"""The commands of `ssm-mp` by name, as typer makes them."""


class WrongLineError(Exception):
    """What in a command line does not exist."""


def lines_of(block: Block) -> list[str]:
    """The commands of a shell block as typed, without comments; a backslash at the end joins two lines."""
    joined = block.text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in joined if (words := shlex.split(line, comments=True))]


def check_line(line: str) -> None:
    """Raise WrongLineError unless everything that a whole command line names exists."""
    words = shlex.split(line)
    while _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program not in _PROGRAMS:
        raise WrongLineError(
            f"{program}: no program that these tests know; say in tests/docs/lines.py how it is checked"
        )
    _PROGRAMS[program](arguments)


def _ssm_mp(arguments: Sequence[str]) -> None:
    name, rest = arguments[0], list(arguments[1:])
    command = command_of(name)
    try:
        found = command.make_context(name, rest).params
    except Exception as error:  # typer's own click is private, and so are its errors
        raise WrongLineError(f"ssm-mp {name}: {error}") from None
    inputs = [found[key] for key in ("study", "checkpoint", "artifact", "path") if found.get(key) is not None]
    for path in inputs:
        require_path(str(path))


def command_of(name: str) -> Any:
    """A command of `ssm-mp`. Raises WrongLineError where there is none of the name."""
    if name not in COMMANDS:
        raise WrongLineError(f"ssm-mp has no command {name!r}")
    return COMMANDS[name]


def options_of(name: str) -> frozenset[str]:
    """The options of a command of `ssm-mp`."""
    return frozenset({"--help", *_options(command_of(name))})


def options_of_all() -> frozenset[str]:
    """The options that `ssm-mp` has before its commands, and `--quiet` behind them too."""
    return frozenset(_options(_GROUP))


def _options(command: Any) -> list[str]:
    return [option for each in command.params for option in (*each.opts, *each.secondary_opts)]


def require_path(path: str) -> None:
    """Raise WrongLineError for a path that the repository does not hold, and that is no example."""
    if not (ROOT / path).exists() and not path.startswith(tuple(EXAMPLES)):
        raise WrongLineError(f"{path}: neither in the repository nor an example")


def _make(arguments: Sequence[str]) -> None:
    for target in arguments:
        if target not in make_targets():
            raise WrongLineError(f"make has no target {target!r}")


@cache
def make_targets() -> frozenset[str]:
    """The targets that people type."""
    found = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return frozenset(found[1].split())


def _python(arguments: Sequence[str]) -> None:
    if arguments[:1] != ["-m"] or len(arguments) < 2:
        raise WrongLineError(f"python {shlex.join(arguments)}: expected python -m MODULE")
    module, asked = arguments[1], arguments[2:]
    if module == "ssm_mp":
        return _ssm_mp(asked) if asked else None
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        raise WrongLineError(f"there is no module {module}")
    unknown = [word for word in asked if word.startswith("--") and word not in options_of_module(module)]
    if unknown:
        raise WrongLineError(f"python -m {module} has no option {', '.join(unknown)}")
    return None


@cache
def options_of_module(module: str) -> frozenset[str]:
    """The options that a module adds to an argument parser."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    added = [call for call in calls if call.func.attr == "add_argument"]  # type: ignore[attr-defined]
    return frozenset(str(a.value) for call in added for a in call.args if isinstance(a, ast.Constant))


def _pip(arguments: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if word in {"-c", "--constraint"}:
            require_path(after)
        asked = re.fullmatch(r"\.\[([\w,-]+)\]", word)
        if asked and not set(asked[1].split(",")) <= set(extras):
            raise WrongLineError(f"pyproject.toml has no extra {asked[1]}")


def _paths(arguments: Sequence[str]) -> None:
    for word in arguments:
        if not word.startswith("-"):
            require_path(word)


_PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "ssm-mp": _ssm_mp,
    "make": _make,
    "python": _python,
    "pip": _pip,
    "pytest": _paths,
    "cp": _paths,
    "sbatch": _paths,
}
