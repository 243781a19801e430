"""Arguments and answers that the commands of `ssm-mp` share."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
StudyPath = Annotated[Path, typer.Argument(help="Study file, TOML.", metavar="STUDY")]
StudyOption = Annotated[Path, typer.Option("--study", help="Study file that says text, windows and scheme.")]
Weights = Annotated[
    str | None, typer.Option(help="Which weights of a checkpoint that holds several, by their key: ema, model.teacher.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run directory; default runs/<study name>.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the study: section.key=value. May be repeated.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")]
ForceBaseline = Annotated[
    bool, typer.Option("--force", help="Go on with a baseline that predicts no better than guessing.")
]
Trials = Annotated[int | None, typer.Option(min=1, help="Number of finished trials to reach.")]


def overrides(set_: list[str] | None, trials: int | None = None, *, force: bool = False) -> list[str]:
    """All overrides of a study file that a command was given."""
    forced = ["search.force_baseline=true"] if force else []
    return [*(set_ or ()), *([] if trials is None else [f"search.trials={trials}"]), *forced]


def passed_on(study: Path, run_dir: Path | None, set_: list[str]) -> list[str]:
    """The arguments that make another command of this tool work on the same study."""
    directory = [] if run_dir is None else ["--run-dir", str(run_dir)]
    return [str(study), *directory, *(part for one in set_ for part in ("--set", one))]


def print_answer(content: Mapping[str, Any], as_json: bool, text: Callable[[Mapping[str, Any]], str]) -> None:
    """Print an answer, as JSON or for people."""
    print(json.dumps(content) if as_json else text(content))


def say(line: str) -> None:
    """Print a line for people. A log on a full disk loses the line, and the work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
