"""Arguments and answers that the commands of `ssm-mp` share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base.paths import shown
from search.base.saying import say
from search.base.streams import write_out

if TYPE_CHECKING:
    from optuna.study import Study

    from search.problem.run_directory import RunDirectory
    from search.problem.spec import StudySpec
    from search.trials.storage import OpenStudy

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
Target = Annotated[
    str | None, typer.Option(help="The runtime whose file the search is for (`ssm-mp formats` lists them).")
]
Trials = Annotated[int | None, typer.Option(min=1, help="Number of finished trials to reach.")]


def overrides(
    set_: list[str] | None, trials: int | None = None, target: str | None = None, *, force: bool = False
) -> list[str]:
    """All overrides of a study file that a command was given."""
    forced = ["search.force_baseline=true"] if force else []
    asked = [typed(one, "--set") for one in set_ or ()]
    aimed = [] if target is None else [f"export.target={typed(target, '--target')}"]
    return [*asked, *([] if trials is None else [f"search.trials={trials}"]), *aimed, *forced]


def opened_study(
    study: Path, run_dir: Path | None, set_: list[str] | None, target: str | None = None
) -> tuple[StudySpec, RunDirectory, Study]:
    """The study file, run directory and trials of a search that was started."""
    spec, run, opened = opened_trials(study, run_dir, set_, target)
    return spec, run, opened.study


def opened_trials(
    study: Path, run_dir: Path | None, set_: list[str] | None, target: str | None = None
) -> tuple[StudySpec, RunDirectory, OpenStudy]:
    """The same, with the trials as their storage holds them, which may be a database that goes away."""
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import load_spec
    from search.trials.storage import opened_as_it_is

    spec = load_spec(study, overrides(set_, target=target))
    run = RunDirectory.of(spec, run_dir)
    run.require()
    return spec, run, opened_as_it_is(run, spec, say)


def typed(text: str, option: str) -> str:
    """A text of the command line, which is in UTF-8 even where the locale (`LC_ALL=C`) knows ASCII alone.

    Raises StudyError for bytes that are no text.
    """
    from search.base.errors import StudyError

    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"{option} {text!r}: expected UTF-8 ({error.reason} at byte {error.start})") from None


def passed_on(study: Path, run_dir: Path | None, set_: list[str]) -> list[str]:
    """The arguments that make another command of this tool work on the same study."""
    directory = [] if run_dir is None else ["--run-dir", str(run_dir)]
    return [str(study), *directory, *(part for one in set_ for part in ("--set", one))]


def print_answer(content: Mapping[str, Any], as_json: bool, text: Callable[[Mapping[str, Any]], str]) -> None:
    """Print an answer, as JSON or for people."""
    write_out((_json(content) if as_json else text(content)) + "\n")


def _json(content: Mapping[str, Any]) -> str:
    """One JSON object, in ASCII whatever the encoding: signs can only stand in strings, as escapes."""
    text = shown(json.dumps(content, ensure_ascii=False))
    return "".join(sign if sign.isascii() else json.dumps(sign)[1:-1] for sign in text)
