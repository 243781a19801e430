"""Commands that write models out: `export` of a study's map, `transfer` of an artifact, `formats`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base.saying import say
from search.cli.options import (
    Force,
    Json,
    Overrides,
    RunDir,
    StudyPath,
    Target,
    Weights,
    opened_study,
    print_answer,
)
from ssm_mp.runtimes.registry import FORMATS

if TYPE_CHECKING:
    from optuna.study import Study

    from search.problem.run_directory import RunDirectory
    from search.problem.spec import StudySpec
    from ssm_mp.artifact import Artifact
    from ssm_mp.checkpoints import Checkpoint
    from ssm_mp.data import Windows
    from ssm_mp.runtimes.format import Format
    from ssm_mp.runtimes.transfer import Transferred

ARTIFACT = "artifact"
FormatName = Annotated[
    str, typer.Option("--format", help="What to write.", metavar="|".join((ARTIFACT, *FORMATS)))
]  # fmt: skip
Widen = Annotated[
    bool, typer.Option("--widen", help="Store what the format cannot hold in the next wider form, and say so.")
]
WithTokenizer = Annotated[
    bool, typer.Option("--tokenizer/--no-tokenizer", help="Put the tokenizer into the file of another runtime.")
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Let the runtime itself read the file.")]


def export(  # noqa: PLR0913, PLR0917, an option of the command each
    study: StudyPath,
    out: Annotated[Path, typer.Option(help="Artifact folder, file or folder to write.")],
    format_: FormatName = ARTIFACT,
    pick: Annotated[
        str,
        typer.Option(
            help="smallest (the certified winner), knee, fastest (with latency), or a trial's number.",
            metavar="smallest|knee|fastest|TRIAL",
        ),
    ] = "smallest",
    widen: Widen = False,
    verify: Verify = True,
    tokenizer: WithTokenizer = True,
    run_dir: RunDir = None,
    set_: Overrides = None,
    target: Target = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Export a map of the front: as an artifact, or for another runtime, which then verifies it."""
    from search.cli.answers import listed
    from search.run.picking import export_pick
    from ssm_mp.runtimes.registry import get_format

    how = None if format_ == ARTIFACT else _How(get_format(format_), out, widen, verify, tokenizer, force)
    spec, run, trials = opened_study(study, run_dir, set_, target)
    if how is not None:
        print_answer(_exported_for(how, spec, run, trials, pick), json_, listed)
        return
    exported, verdict = export_pick(spec, run, trials, pick, out, replace=force, say=say)
    content = {
        "path": str(out),
        "map": exported.artifact.precision_map.to_json(),
        "compression": exported.compression,
        **({} if exported.source_compression is None else {"source_compression": exported.source_compression}),
        "bytes": exported.artifact.tensor_bytes,
        "file_bytes": exported.artifact.file_bytes,
        "perplexity": exported.perplexity,
        **spec.search.judged.answer({"increase_percent": exported.increase_percent}),
        "certificate": verdict,
        **({} if exported.latency is None else {"latency_seconds": exported.latency}),
        "verified": True,  # export raises where what is read back is not what was measured
    }
    print_answer(content, json_, listed)


@dataclass(frozen=True)
class _How:
    """How a file for another runtime is to be written."""

    format: Format
    out: Path
    widen: bool
    verify: bool
    tokenizer: bool
    force: bool


def _exported_for(how: _How, spec: StudySpec, run: RunDirectory, trials: Study, pick: str) -> dict[str, Any]:
    """The answer of `export` for another runtime."""
    from search.results.transferred import perplexity_on_search, speaks_of, transfer_map
    from search.run.picking import picked
    from ssm_mp.components import fp32_bytes
    from ssm_mp.runtimes.placing import require_free
    from ssm_mp.runtimes.running import require_writer

    format_ = how.format
    require_free(how.out, format_.suffix, how.force)
    require_writer(format_)
    found = picked(spec, run, trials, pick, say)
    workspace = found.workspace
    done = transfer_map(
        workspace, workspace.space.map(found.point.map), format_, how.out, certificate=found.certificate,
        provenance={"trial": found.point.trial}, widen=how.widen, verify=how.verify, tokenizer=how.tokenizer,
        replace=how.force,
    )  # fmt: skip
    its_own = speaks_of(workspace, format_, done.plan)
    if done.plan.widened:
        say("note: components are wider in the file than in the map, so the map's certificate is not the file's")
    elif done.plan.notes:
        say("note: values are rounded anew in the file, so the map's certificate is not quite the file's")
    elif not its_own:
        say(
            f"note: the study was not for {format_.word}, so its certificate is of another arithmetic (inputs "
            f"{spec.precision.activations}) than this file's; a search with --target {format_.word} certifies the file "
            "itself"
        )
    return {
        **_told(done),
        "compression": fp32_bytes(workspace.converter.components) / done.plan.bytes,
        "perplexity_on_search": perplexity_on_search(workspace, done),
        "certificate": found.verdict if its_own else "of another file",
    }


def transfer(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.", metavar="ARTIFACT")],
    out: Annotated[Path, typer.Option(help="File or folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="For which runtime.", metavar="|".join(FORMATS))],
    study: Annotated[Path | None, typer.Option(help="Study whose certify windows the runtime is asked about.")] = None,
    widen: Widen = False,
    verify: Verify = True,
    tokenizer: WithTokenizer = True,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write an artifact's model for another runtime, which then verifies it."""
    from search.cli.answers import listed
    from search.results.transferred import NOT_ASKED, transfer_artifact
    from ssm_mp.artifact import read_artifact
    from ssm_mp.runtimes.placing import require_free
    from ssm_mp.runtimes.registry import get_format
    from ssm_mp.runtimes.running import require_writer

    chosen = get_format(format_)
    require_free(out, chosen.suffix, force)
    require_writer(chosen)
    found = read_artifact(artifact)
    windows = _windows(found, study) if verify else None
    why = NOT_ASKED if not verify else "not verified: the artifact has no tokenizer; --study names windows to ask about"
    done = transfer_artifact(
        found, chosen, out, windows, widen=widen, tokenizer=tokenizer, unverified=why, replace=force
    )
    print_answer(_told(done), json_, listed)


def _windows(artifact: Artifact, study: Path | None) -> Windows | None:
    """Certify windows of a study; else some of the text that every user has, with the artifact's own tokenizer."""
    from search.problem.spec import load_spec
    from search.problem.splits import load_splits
    from search.results.transferred import ASKED_WINDOWS
    from ssm_mp.data import cut, draw, load_tokenizer, tokenize
    from ssm_mp.data.corpus import stdlib_documents

    config = artifact.model.config
    if study is not None:
        return load_splits(load_spec(study), config, say).certify
    if artifact.tokenizer is None:
        return None
    tokenizer = load_tokenizer(artifact.tokenizer, config.vocabulary, say)
    documents = stdlib_documents("certify")[::_EVERY]
    pool = cut(tokenize(documents, tokenizer), min(config.max_tokens or _LENGTH, _LENGTH), "the library", None)
    return draw(pool, [ASKED_WINDOWS], seed=0)[0]


_EVERY, _LENGTH = 20, 256
"""Of the library's files, which are read; tokens of a window."""


def _told(done: Transferred) -> dict[str, Any]:
    """What both commands say of a written file."""
    told = done.to_json()
    widened = {name: f"{asked} as {stored}" for name, (asked, stored) in done.plan.widened.items()}
    return {
        "path": str(done.path),
        "format": told["format"],
        "bytes": told["bytes"],
        "file_bytes": told["file_bytes"],
        **({"widened": ", ".join(f"{name}: {how}" for name, how in widened.items())} if widened else {}),
        **({"notes": "; ".join(done.plan.notes)} if done.plan.notes else {}),
        "verified": told["verified"],
        "verdict": done.unverified if done.verdict is None else done.verdict.sentence,
        "next": done.command,
    }


def formats(
    checkpoint: Annotated[Path | None, typer.Argument(metavar="[CHECKPOINT]")] = None,
    weights: Weights = None,
    json_: Json = False,
) -> None:
    """Show the formats that a model can be written in, and what each holds of a checkpoint."""
    from search.cli.answers import formatted
    from ssm_mp.checkpoints import load_checkpoint
    from ssm_mp.conversion.regroup import has_experts, regrouped

    found = None if checkpoint is None else load_checkpoint(checkpoint, weights)
    if found is not None and has_experts(found.config):
        say('note: with [precision] experts = "together", as files of other runtimes hold experts')
        found = regrouped(found, "together")
    answer = [_described(word, found) for word in FORMATS]
    print_answer({"formats": answer}, json_, formatted)


def _described(word: str, found: Checkpoint | None) -> dict[str, Any]:
    """One format, and what it holds of a checkpoint."""
    from ssm_mp.components import find_components
    from ssm_mp.runtimes.capability import table
    from ssm_mp.runtimes.registry import get_format
    from ssm_mp.runtimes.running import cannot_verify, named

    format_ = get_format(word)
    about = {"format": word, "runtime": named(format_), "here": cannot_verify(format_) or "installed"}
    if found is None:
        return about
    refused = format_.refusal(found.config)
    rows = [] if refused else table(format_, find_components(found), found.config)
    held = [
        {
            "kind": row.kind,
            "row": row.row,
            "components": row.components,
            "precisions": {
                name: None if one is None else {"as": one.word, "bytes": one.bytes, "note": one.note}
                for name, one in row.encodings
            },
        }
        for row in rows
    ]
    return {**about, "refused": refused, "rows": held}
