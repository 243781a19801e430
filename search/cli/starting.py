"""The command that begins a study: `init` drafts its file from a checkpoint and a text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base.saying import say
from search.base.whole_file import write_whole
from search.cli.options import Json, Weights, print_answer, typed

if TYPE_CHECKING:
    from search.problem.draft import Draft

_GENERIC = ("model", "pytorch_model", "consolidated", "checkpoint", "weights")
"""Names of files that say nothing of the model: the study has the name of their folder."""


def init(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: a file or a Hugging Face folder.", metavar="MODEL")],
    text: Annotated[
        list[str],
        typer.Option(
            help="Text: a file, a folder, a pattern in quotes, token ids as .npy, or python-stdlib. May be repeated."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Study file to write; default: the model's name, here.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer file, or "bytes"; default: the one beside the checkpoint.')
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSON lines, or column of a table, with the text.")] = "text",
    weights: Weights = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a study file that is already there.")] = False,
    json_: Json = False,
) -> None:
    """Begin a study: look at a checkpoint and a text, and write the study file, filled in."""
    from search.base.errors import StudyError
    from search.problem.draft import drafted
    from search.problem.spec import load_spec

    study = Path(f"{_name_of(checkpoint)}.toml") if out is None else out
    if study.exists() and not force:
        raise StudyError(f"{study} exists already; --force replaces it, --out names another")
    names = tuple(typed(name, "--text") for name in text)
    named = None if tokenizer is None else typed(tokenizer, "--tokenizer")
    draft = _draft(study, checkpoint, weights, names, text_field, named)
    write_whole(study, drafted(draft, str(study)), new_folders=True)
    load_spec(study)
    content = {
        "study": str(study),
        "family": draft.model.family,
        "parameters": draft.model.parameters,
        "components": draft.model.components,
        "free": draft.model.free,
        "tokenizer": draft.tokenizer,
        "documents": None if draft.found is None else draft.found.documents,
        "windows": dict(zip(("calibration", "search", "certify"), draft.windows, strict=True)),
        "next": f"ssm-mp search {shlex.quote(str(study))}",
    }
    print_answer(content, json_, _begun)


def _draft(
    study: Path, checkpoint: Path, weights: str | None, texts: tuple[str, ...], field: str, tokenizer: str | None
) -> Draft:
    """What a study file would say, its paths seen from it."""
    from search.problem.draft import Draft
    from search.problem.found import find_device, find_model, find_text, find_tokenizer_for
    from search.problem.spec import STDLIB, StudySpec
    from ssm_mp.data import BYTES

    here = StudySpec.model_validate(  # paths as they are seen from here: the study's own folder may not exist yet
        {
            "checkpoint": {"path": str(checkpoint), "weights": weights},
            "data": {"text": texts, "text_field": field, "tokenizer": tokenizer},
            "path": Path(study.name),
        }
    )
    found, model = find_model(checkpoint, weights, say)
    named = find_tokenizer_for(here, model.vocabulary)
    here = here.model_copy(update={"data": here.data.model_copy(update={"tokenizer": named})})
    return Draft(
        checkpoint=_seen_from(study, str(checkpoint)),
        weights=weights,
        texts=tuple(name if name == STDLIB else _seen_from(study, name) for name in texts),
        text_field=field,
        tokenizer=named if named in (None, BYTES) else _seen_from(study, named),
        model=model,
        found=find_text(here, found.config, say),
        device=find_device(),
    )


def _begun(answer: Mapping[str, Any]) -> str:
    """What was found, and the next commands."""
    parts = " + ".join(f"{count} {split}" for split, count in answer["windows"].items())
    documents = answer["documents"]
    of = "" if documents is None else f" of {documents:,} document{'' if documents == 1 else 's'}"
    return "\n".join(
        (
            f"found     family {answer['family']}, {answer['parameters']:,} parameters, {answer['free']} of "
            f"{answer['components']} components free to move",
            f"windows   {parts}{of}",
            f"written   {answer['study']}, to be read and changed",
            f"next      {answer['next']} --dry-run   (what it will take)",
            f"          {answer['next']}",
        )
    )


def _name_of(checkpoint: Path) -> str:
    """A study's name: that of the model's folder, or of its file where that says something."""
    path = Path(os.path.abspath(checkpoint))  # noqa: PTH100  # links are not followed: their names are the user's
    name = path.name if path.is_dir() else path.name.split(".")[0]
    return path.parent.name if name in _GENERIC and not path.is_dir() and path.parent.name else name


def _seen_from(study: Path, path: str) -> str:
    """A path as the study file says it: relative paths from the file's own folder, others as they are."""
    return path if Path(path).is_absolute() or path.startswith(("~", "$")) else os.path.relpath(path, study.parent)
