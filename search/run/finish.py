"""The end of a search: front, certificate, export of the winner, plots, report; all in the run directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.study import Study

from search.base.front import Point, front_by_size, pareto_front
from search.base.metric import PERPLEXITY, Metric
from search.measure.objective import require_knowing
from search.measure.probe import Probe
from search.problem.groups import NO_GROUPS, Groups
from search.problem.run_directory import (
    CERTIFICATE,
    FRONT,
    PROVENANCE,
    REPORT,
    WINNER,
    RunDirectory,
)
from search.problem.source import source_of
from search.problem.spec import StudySpec
from search.problem.workspace import Workspace
from search.results.certify import Certificate
from search.results.export import export, provenance_of, timing_seconds
from search.results.gates import Gate, judge
from search.results.known import known_of, seconds_spent
from search.results.outlook import outlook
from search.results.plots.components import plot_allocation, plot_sensitivities
from search.results.plots.files import save
from search.results.plots.front import plot_front
from search.results.report import Result, front_json, render
from search.results.transferred import transfer_map
from search.run.certifying import certify_baseline, certify_front
from search.run.fidelity import measured_fidelity
from search.run.page import page_content, write_page
from search.run.prepare import Prepared, Say
from search.run.study import prediction_error
from search.trials.read_back import counts, finished_differences, points
from ssm_mp.artifact_folder import remove_artifact
from ssm_mp.components import Component
from ssm_mp.errors import ArtifactError, DataError, ExportError
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.placing import remove
from ssm_mp.runtimes.registry import get_format
from ssm_mp.runtimes.transfer import Transferred


def finish(study: Study, prepared: Prepared, run: RunDirectory, say: Say) -> Result:
    """Front, certificate, export of the winner, plots, report."""
    workspace, baseline = prepared.workspace, prepared.baseline
    spec = workspace.spec
    found = points(study, workspace.space.choices)
    front = pareto_front(found, spec.search.budget_percent)
    differences = [held for _, held in finished_differences(study)]
    certificate = certify_front(workspace, run, front_by_size(front), differences, say)
    exported, failure = None, ""
    winner = next((p for p in front if certificate is not None and p.trial == certificate.winner), None)
    fidelity = None
    if winner is not None:
        fidelity = measured_fidelity(workspace, run, winner, certify_baseline(workspace, run))
        say(f"exporting trial {winner.trial} and reading it back")
        try:
            exported = export(
                workspace, baseline, workspace.space.map(winner.map), run / WINNER,
                known=known_of(study, winner.trial), certificate=certificate, provenance={"trial": winner.trial},
                replace=True, latency=prepared.latency, say=say, fidelity=fidelity,
                seconds=timing_seconds(seconds_spent(study, prepared.began)),
            )  # fmt: skip
        except (ArtifactError, DataError) as error:  # the report must still say what was found, and that this failed
            failure = str(error)
            say(f"error: {failure}")
    else:
        clear_winner(run / WINNER, say)
    transferred, runtime = for_target(workspace, run, None if failure else winner, certificate, say)
    facts = None if exported is None else exported.facts
    if facts is not None and transferred is not None:
        facts = replace(facts, compression=baseline.bytes / transferred.plan.bytes)
    run.write_json(CERTIFICATE, None if certificate is None else certificate.to_json())
    result = Result(
        spec=spec,
        components=workspace.space.components,
        pins=workspace.space.pins,
        baseline_perplexity=baseline.perplexity,
        baseline_bytes=baseline.bytes,
        points=found,
        front=front,
        counts=counts(study),
        surrogate=prepared.surrogate,
        prediction_error=prediction_error(prepared.knowledge, study),
        certificate=certificate,
        gates=judge(certificate, facts, failure, runtime, spec.search.judged),
        benchmark=exported.benchmark if exported else None,
        provenance=provenance_of(workspace),
        latency=prepared.latency,
        windows=workspace.splits.described(),
        doubt=require_knowing(workspace, baseline.evaluation),
        source=source_of(workspace.checkpoint),
        transferred=transferred,
        groups=workspace.space.groups,
        fidelity=fidelity,
    )
    draw(run, spec, result.components, found, prepared.probes, certificate, baseline.bytes, result.groups)
    run.write_text(REPORT, render(result))
    run.write_json(FRONT, answer(result))
    run.write_json(PROVENANCE, result.provenance)
    said = describe(certificate, bool(front), spec.search.judged)
    write_page(run, page_content(spec, run, study, prepared.probes, _baseline_of(result), certificate, said))
    return result


def target_path(run: RunDirectory, format_: Format) -> Path:
    """Where the winner's file for a target stands."""
    return run / (f"{WINNER}{format_.suffix}" if format_.suffix else f"{WINNER}-{format_.word}")


def for_target(
    workspace: Workspace, run: RunDirectory, winner: Point | None, certificate: Certificate | None, say: Say
) -> tuple[Transferred | None, Gate | None]:
    """The winner's file for the study's target, None where there is none, and the gate that it makes.

    A file of a former winner, or one that could not be replaced, does not stay: it would be taken for the winner's.
    """
    target = workspace.spec.export.target
    if target is None:
        return None, None
    format_ = get_format(target)
    out = target_path(run, format_)
    if winner is None:
        _clear_target(out, format_, say)
        return None, None
    say(f"writing {out} and asking {format_.runtime} about it")
    try:
        done = transfer_map(
            workspace, workspace.space.map(winner.map), format_, out,
            certificate=certificate, provenance={"trial": winner.trial}, replace=True,
        )  # fmt: skip
    except (ExportError, DataError) as error:  # the report must still say what was found, and that this failed
        say(f"error: {error}")
        _clear_target(out, format_, say)
        return None, Gate(target, "fail", str(error))
    if done.verdict is None:
        return done, Gate(target, "warn", done.unverified)
    return done, Gate(target, "pass", done.verdict.sentence)


def _clear_target(out: Path, format_: Format, say: Say) -> None:
    """Remove the file of a former winner."""
    try:
        remove(out, format_.suffix)
    except OSError as error:  # the report must still be written
        say(f"note: {out} is of a former winner and cannot be removed ({error})")


def clear_winner(folder: Path, say: Say) -> None:
    """Remove a former winner, which has lost; whatever else is in its folder is kept under another name."""
    try:
        if not remove_artifact(folder) or not folder.exists():
            return
        kept = next(
            path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}-kept-{n}")).exists()
        )
        folder.rename(kept)
    except (OSError, ArtifactError) as error:  # the report must still be written
        say(f"note: {folder} is a former winner, which has lost, and cannot be removed ({error})")
        return
    say(f"note: the former winner was removed; the other files in {folder} are now in {kept}")


def draw(
    run: RunDirectory,
    spec: StudySpec,
    components: tuple[Component, ...],
    found: Sequence[Point],
    probes: Sequence[Probe],
    certificate: Certificate | None,
    baseline_bytes: int,
    groups: Groups = NO_GROUPS,
) -> list[Path]:
    """The study's pictures, PNG and SVG. The allocation is the winner's, or the smallest front map's where none won."""
    budget = spec.search.budget_percent
    winner = None if certificate is None else certificate.winner
    front = pareto_front(found, budget)
    metric = spec.search.judged
    sentence = describe(certificate, bool(front), metric)
    picture = plot_front(found, budget, winner, sentence, baseline_bytes, spec.export.target, metric)
    paths = save(picture, run.path, "front")
    if probes:
        paths += save(plot_sensitivities(probes, components, groups, metric), run.path, "sensitivities")
    shown = next((point for point in front if point.trial == winner), front[0] if front else None)
    if shown is not None:
        allocation = PrecisionMap(tuple(shown.map.items()))
        paths += save(plot_allocation(components, allocation, spec.precision.activations), run.path, "allocation")
    return paths


def describe(certificate: Certificate | None, any_within: bool, metric: Metric = PERPLEXITY) -> str:
    """The certificate in one sentence, for titles; `any_within` tells an empty front from one not yet certified."""
    if certificate is None:
        return "Not certified yet." if any_within else "No map is within the budget on the search windows."
    return (
        f"{certificate.verdict.capitalize()} on {certificate.windows} unseen windows"
        f"{'' if certificate.basis == 'windows' else f' of {certificate.clusters} documents'}: "
        f"{metric.said(certificate.increase_percent, 2)}, at most {metric.said(certificate.upper_percent, 2)} "
        f"({100 * certificate.confidence:g} % confidence), budget +{metric.budget(certificate.budget_percent)}"
    )


def answer(result: Result) -> dict[str, Any]:
    """What `search` and `front` answer, with the gates."""
    certificate = None if result.certificate is None else result.certificate.to_json()
    budget, baseline = result.spec.search.budget_percent, _baseline_of(result)
    content = front_json(
        result.points, result.front, baseline, budget, certificate, result.latency, outlook(result.certificate),
        result.spec.search.judged, result.fidelity,
    )  # fmt: skip
    return json.loads(json.dumps({**content, "gates": [gate.to_json() for gate in result.gates]}))  # type: ignore[no-any-return]


def _baseline_of(result: Result) -> dict[str, Any]:
    """The FP32 checkpoint in answers."""
    source = {} if result.source is None else result.source.to_json()
    return {"perplexity": result.baseline_perplexity, "bytes": result.baseline_bytes, **source}
