"""The command line, `ssm-mp`. Answers go to standard output, everything else to standard error.

Exit codes: 0 done, 1 the answer is no, 2 the user's mistake, 3 the environment's,
141 nobody read standard output to its end.
Heavy imports stand inside the commands, so that help and small questions answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.base.saying import QUIET, Said, is_terminal, say
from search.base.streams import READER_GONE, close_streams, open_streams, write_out
from search.cli import cluster, decoding, exporting, reporting, starting
from search.cli.options import (
    Force,
    ForceBaseline,
    Json,
    Overrides,
    RunDir,
    StudyOption,
    StudyPath,
    Target,
    Trials,
    Weights,
    opened_study,
    overrides,
    passed_on,
    print_answer,
)
from search.cli.panels import Commands

if TYPE_CHECKING:
    from search.results.report import Result

app = typer.Typer(
    name="ssm-mp",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout is not None and is_terminal(sys.stdout) else None,
    help="Find the smallest mixed-precision version of a state-space language model within a perplexity budget.\n\n"
    "Start with:  ssm-mp init MODEL --text TEXT",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        write_out(f"ssm-mp {version('ssm-mp')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but the answer and errors; may stand behind a command.")
    ] = False,
) -> None:
    if quiet:
        os.environ[QUIET] = "1"  # workers inherit it


class Split(StrEnum):
    """Windows that an evaluation may use."""

    search = "search"
    certify = "certify"


for command, example in (
    (starting.init, "ssm-mp init path/to/model --text path/to/text.txt"),
    (cluster.launch, "ssm-mp launch studies/x.toml --workers 8 --dry-run"),
    (cluster.worker, "ssm-mp worker studies/x.toml   (in as many processes as you like)"),
    (cluster.prepare, "ssm-mp prepare studies/x.toml"),
    (cluster.finish, "ssm-mp finish studies/x.toml"),
    (cluster.status, "ssm-mp status studies/x.toml --watch"),
    (cluster.proxy, "ssm-mp proxy studies/x.toml --host 0.0.0.0"),
    (decoding.generate, 'ssm-mp generate exports/x --study studies/x.toml --prompt "def main(" --compare'),
    (decoding.drift, "ssm-mp drift exports/x --study studies/x.toml --out drift.png"),
    (reporting.report, "ssm-mp report studies/x.toml --serve"),
    (exporting.transfer, "ssm-mp transfer exports/x --format gguf --out x.gguf --study studies/x.toml"),
    (exporting.formats, "ssm-mp formats studies/hybrid"),
):
    app.command(epilog=f"Example:  {example}")(command)
app.command(
    epilog="Examples:  ssm-mp export studies/reference.toml --out exports/reference\n\n"
    "ssm-mp export studies/reference.toml --out exports/knee --pick knee\n\n"
    "ssm-mp export studies/hybrid.toml --format gguf --out exports/hybrid.gguf"
)(exporting.export)


@app.command(epilog="Example:  ssm-mp inspect studies/reference/model.safetensors")
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")], weights: Weights = None, json_: Json = False
) -> None:
    """Show a checkpoint's family, layout, types, config and component table."""
    from search.cli.answers import inspected
    from search.results.report import component_rows
    from ssm_mp.checkpoints import load_checkpoint
    from ssm_mp.components import find_components, fp32_bytes
    from ssm_mp.families.registry import config_to_json
    from ssm_mp.precision_map import pinned_names

    found = load_checkpoint(checkpoint, weights)
    for note in found.notes:
        say(f"note: {note}")
    components = find_components(found)
    content = {
        "family": found.family,
        "layout": found.layout,
        "config": config_to_json(found.config),
        "parameters": sum(component.count for component in components),
        "fp32_bytes": fp32_bytes(components),
        "file_types": dict(found.file_types),
        "file_bytes": found.file_bytes,
        "notes": list(found.notes),
        "components": component_rows(components, pinned_names(components)),
    }
    print_answer(content, json_, inspected)


@app.command(epilog="Example:  ssm-mp evaluate runs/reference/winner --study studies/reference.toml --split certify")
def evaluate(
    path: Annotated[Path, typer.Argument(help="Checkpoint, or artifact folder.", metavar="PATH")],
    study: StudyOption,
    split: Annotated[Split, typer.Option(help="Which windows.")] = Split.search,
    weights: Weights = None,
    json_: Json = False,
) -> None:
    """Measure the perplexity of a checkpoint or an artifact on a study's windows."""
    from search.base.progress import slow
    from search.cli.answers import listed
    from search.problem.spec import load_spec
    from search.problem.splits import load_splits
    from search.problem.workspace import check_device, fp32_model
    from ssm_mp.artifact import is_artifact, read_artifact
    from ssm_mp.checkpoints import load_checkpoint
    from ssm_mp.data import unigram_perplexity
    from ssm_mp.evaluation.evaluate import evaluate as measure
    from ssm_mp.evaluation.evaluate import layer_calls, require_better_than_guessing

    spec = load_spec(study)
    device = check_device(spec.search.device)
    converted = is_artifact(path)
    if converted:
        model = read_artifact(path, str(device)).model
    else:
        checkpoint = load_checkpoint(path, weights or spec.weights_of(path))
        for note in checkpoint.notes:
            say(f"note: {note}")
        model, _ = fp32_model(spec, checkpoint, device)
    splits = load_splits(spec, model.config, say)
    windows = splits.certify if split is Split.certify else splits.search
    progress = slow("evaluating", layer_calls(model, windows))
    evaluation = measure(model, windows, progress.step)
    progress.close()
    if not converted and not spec.search.force_baseline:
        unigram = unigram_perplexity(splits.token_counts, windows)
        require_better_than_guessing(evaluation, model.config.vocabulary, unigram)
    content = {"perplexity": evaluation.perplexity, "windows": evaluation.windows, "tokens": evaluation.tokens}
    print_answer(content, json_, listed)


@app.command(
    epilog="Example:  ssm-mp convert studies/reference/model.safetensors --map aggressive "
    "--study studies/reference.toml --out exports/aggressive"
)
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
    map_: Annotated[str, typer.Option("--map", help="conservative, aggressive, or a map file (TOML or JSON).")],
    study: StudyOption,
    out: Annotated[Path, typer.Option(help="Artifact folder to write.")],
    weights: Weights = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Convert a checkpoint by one precision map, without a search."""
    from search.cli.answers import listed
    from search.measure.objective import measure_baseline
    from search.problem.spec import load_spec
    from search.problem.workspace import open_workspace
    from search.results.export import export
    from ssm_mp.artifact import require_free
    from ssm_mp.errors import PrecisionMapError
    from ssm_mp.precision_map import PRESETS, PrecisionMap, read_rules

    require_free(out, force)
    if map_ not in PRESETS and not Path(map_).exists():
        raise PrecisionMapError(f"--map {map_}: expected {', '.join(PRESETS)} or an existing map file")
    rules = None if map_ in PRESETS else read_rules(map_)
    spec = load_spec(study, ["checkpoint.path=given"]).with_checkpoint(checkpoint, weights)
    workspace = open_workspace(spec, say)
    components, pins = workspace.space.components, workspace.space.pins
    if rules is None:
        precision_map = PrecisionMap.preset(map_, components, pins)
    else:
        precision_map = PrecisionMap.from_rules(rules, components, pins)
    exported = export(workspace, measure_baseline(workspace), precision_map, out, replace=force, say=say)
    content = {
        "path": str(out),
        "compression": exported.compression,
        **({} if exported.source_compression is None else {"source_compression": exported.source_compression}),
        "bytes": exported.artifact.tensor_bytes,
        "file_bytes": exported.artifact.file_bytes,
        "perplexity": exported.perplexity,
        **spec.search.judged.answer({"increase_percent": exported.increase_percent}),
    }
    print_answer(content, json_, listed)


@app.command(epilog="Example:  ssm-mp probe studies/reference.toml")
def probe(
    study: StudyPath, run_dir: RunDir = None, set_: Overrides = None, force: ForceBaseline = False, json_: Json = False
) -> None:  # fmt: skip
    """Measure how sensitive each component is to each precision, from both ends."""
    from search.base.metric import PERPLEXITY
    from search.cli.answers import probed
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import load_spec
    from search.run.prepare import prepare

    spec = load_spec(study, overrides(set_, force=force))
    run = RunDirectory.of(spec, run_dir)
    with run.owned():
        prepared = prepare(spec, run, say)
    metric = spec.search.judged
    found = [metric.answer(measured.to_json()) for measured in prepared.probes]
    named = {} if metric is PERPLEXITY else {"metric": metric.word}
    print_answer({"probes": found, **named}, json_, probed)


@app.command(
    epilog="Examples:  ssm-mp search studies/reference.toml\n\n"
    "ssm-mp search studies/reference.toml --dry-run   (what it would take)\n\n"
    "ssm-mp search studies/reference.toml --trials 200   (adds to what is there)\n\n"
    "ssm-mp search my.toml --workers 4 --set search.sampler=nsga2 --run-dir runs/other"
)
def search(
    study: StudyPath,
    trials: Trials = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run trials on this machine.")] = 1,
    run_dir: RunDir = None,
    set_: Overrides = None,
    target: Target = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, in space, time and memory; search nothing.")
    ] = False,
    force: ForceBaseline = False,
    json_: Json = False,
) -> None:
    """Run or continue a search: probes, trials, front, certificate, winner, plots, report."""
    from search.problem.run_directory import RunDirectory
    from search.problem.spec import load_spec
    from search.run.local_workers import run_local
    from search.run.one_process import run_search

    asked = overrides(set_, trials, target, force=force)
    spec = load_spec(study, asked)
    run = RunDirectory.of(spec, run_dir)
    if dry_run:
        from search.cli.answers import foretold
        from search.run.forecast import forecast

        return print_answer(forecast(spec, run, say).to_json(), json_, foretold)
    try:
        result: Result | None
        if workers == 1:
            result = run_search(spec, run, say)
        else:
            result = run_local(spec, run, passed_on(study, run_dir, asked), workers, say)
    except KeyboardInterrupt:
        say("interrupted; the same command continues where it stopped")
        raise
    return cluster.conclude(result, run, json_)


@app.command(epilog="Example:  ssm-mp front studies/reference.toml --json")
def front(
    study: StudyPath, run_dir: RunDir = None, set_: Overrides = None, target: Target = None, json_: Json = False
) -> None:
    """Show the Pareto front so far, while a search runs or after it."""
    from search.base.front import pareto_front
    from search.cli.answers import fronted
    from search.measure.latency import stored_latency
    from search.results.outlook import outlook
    from search.results.report import front_json
    from search.run.fidelity import stored_fidelity
    from search.run.stored import stored_baseline, stored_certificate
    from search.trials.read_back import points

    spec, run, trials = opened_study(study, run_dir, set_, target)
    found = points(trials, run.space())
    within = pareto_front(found, spec.search.budget_percent)
    certificate = stored_certificate(run, spec, within)
    if certificate is None:
        say("note: no certificate for this front and budget yet; `ssm-mp search` makes it")
    content = front_json(
        found,
        within,
        stored_baseline(run),
        spec.search.budget_percent,
        certificate.to_json() if certificate else None,
        stored_latency(run),
        outlook(certificate),
        spec.search.judged,
        stored_fidelity(run, None if certificate is None else certificate.winner),
    )
    print_answer(content, json_, fronted)


@app.command(epilog="Example:  ssm-mp plot studies/reference.toml")
def plot(
    study: StudyPath, run_dir: RunDir = None, set_: Overrides = None, target: Target = None, json_: Json = False
) -> None:
    """Draw the plots again from what the run directory holds."""
    from search.cli.answers import listed
    from search.run.stored import redraw

    spec, run, trials = opened_study(study, run_dir, set_, target)
    print_answer({path.name: str(path) for path in redraw(spec, run, trials)}, json_, listed)


def main() -> None:
    """Run the command line; a known failure is one clear line and its exit code, never a traceback."""
    streams = open_streams()
    logging.getLogger("ssm_mp").addHandler(Said())
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it advises on its cache where there is no home
    code: int | str | None
    try:
        app(prog_name="ssm-mp")
        code = 0
    except SystemExit as ended:
        # typer's own code for a pipe whose reader left is 1, which here means "the answer is no"
        code = READER_GONE if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # every failure is told apart in one place
        code = _explained(error)
    close_streams(streams)
    sys.exit(code)


def _explained(error: Exception) -> int:
    """Print what went wrong and return the exit code; a traceback only for a defect of ours."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    from ssm_mp.errors import MachineError, SsmMpError

    if isinstance(error, SsmMpError):
        say(f"error: {error}")
        return error.exit_code
    if isinstance(error, OSError | MemoryError | SQLAlchemyError | StorageInternalError):
        reason = str(error.__cause__ or error).split("\n")[0]
        say(f"error: this machine did not let it finish ({type(error).__name__}: {reason})")
    else:
        traceback.print_exception(error)
    return MachineError.exit_code


if __name__ == "__main__":
    main()
