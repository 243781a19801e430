"""A whole search: baseline, probes, seeds, trials, front, certificate, export, plots, report."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from search import plots
from search.catalogue import catalogue_of
from search.certify import Certificate, Try, certify
from search.export import export, provenance_of
from search.front import Point, pareto_front
from search.gates import judge
from search.gradient import gradient_probes, gradient_windows
from search.knowledge import Knowledge, before_any_trial
from search.objective import Baseline, Measured, Objective, measure_baseline
from search.probe import GRADIENT, LOWEST, WIDEST, End, Probe, open_end, planned, probe_from_stored, run_probes
from search.progress import Progress
from search.report import Result, front_json, render
from search.run_directory import BASELINE, CERTIFICATE, FRONT, PROBES, REPORT, TRIES, WINNER, RunDirectory
from search.spec import StudySpec
from search.study import (
    Seed,
    enqueue,
    finished_differences,
    open_study,
    points,
    prediction_error,
    reconsider,
    recover,
    run_trials,
    status,
)
from search.surrogate import Surrogate, additive, effects_of_size, fit, predicted_front
from search.workspace import Workspace, open_workspace
from ssm_mp.components import Component
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluate import Increase, evaluate, paired_increase
from ssm_mp.precision import FOUR_BIT
from ssm_mp.precision_map import PRESETS, PrecisionMap

Say = Callable[[str], None]
"""Told a line for people before each slow step."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What trials need: the loaded study, its baseline, both ends and the surrogate of its probes."""

    workspace: Workspace
    baseline: Baseline
    probes: list[Probe]
    surrogate: Surrogate
    knowledge: Knowledge


def prepare(spec: StudySpec, run: RunDirectory, say: Say) -> Prepared:
    """Load, check the fingerprint, measure baseline and probes; what a former run measured is not measured again."""
    workspace = open_workspace(spec, say)
    run.check_fingerprint(workspace.fingerprint())
    baseline = measure_baseline(workspace)
    run.write_json(BASELINE, {"perplexity": baseline.perplexity, "bytes": baseline.bytes})
    say(
        f"baseline: perplexity {baseline.perplexity:.4f} on {baseline.evaluation.windows} windows, "
        f"{baseline.bytes:,} bytes in FP32"
    )
    widest, lowest = open_end(workspace, WIDEST), open_end(workspace, LOWEST)
    probes = _probe(workspace, (widest, lowest), run)
    offsets = [paired_increase(end.evaluation, baseline.evaluation).log_mean for end in (widest, lowest)]
    if spec.search.probe == "none":
        surrogate = additive(workspace.space, effects_of_size(workspace.space, *offsets), *offsets)
    else:
        surrogate = fit(workspace.space, probes, *offsets)
    say(
        f"probes: {len(probes)}; all-lowest costs {100 * math.expm1(offsets[1]):+.3f} %, "
        f"the sum of effects misses that by {100 * surrogate.gap:+.3f} %"
    )
    return Prepared(workspace, baseline, probes, surrogate, _knowledge(workspace, surrogate, probes, offsets))


def _probe(workspace: Workspace, ends: tuple[End, End], run: RunDirectory) -> list[Probe]:
    """The study's probes, of the kind that it asks for; those of a former run are not measured again."""
    if workspace.spec.search.probe == "none":
        return []
    owner, gradient = workspace.fingerprint_digest, workspace.spec.search.probe == "gradient"
    stored = [probe_from_stored(line["probe"]) for line in run.read_lines(PROBES) if line["fingerprint"] == owner]
    done = [probe for probe in stored if (probe.end == GRADIENT) == gradient]
    if gradient:
        if not done:
            done = gradient_probes(workspace, Progress("gradients", len(gradient_windows(workspace))).step)
            run.append_lines(PROBES, [{"fingerprint": owner, "probe": probe.stored()} for probe in done])
        return done
    progress = Progress("probes", planned(workspace), len(done))

    def save(probe: Probe) -> None:
        run.append_lines(PROBES, [{"fingerprint": owner, "probe": probe.stored()}])
        progress.step()

    return run_probes(workspace, ends, done, save)


def _knowledge(
    workspace: Workspace, surrogate: Surrogate, probes: Sequence[Probe], offsets: Sequence[float]
) -> Knowledge:
    """What the sampler starts from: expected effects, and all maps that probes and ends have measured."""
    space = workspace.space
    ends = {WIDEST: (space.widest(), offsets[0]), LOWEST: (space.lowest(), offsets[1])}
    measured = [(space.chosen(held), offset) for held, offset in ends.values()]
    for probe in probes:
        if probe.end in ends:
            held, offset = ends[probe.end]
            changed = held.changed({probe.component: probe.precision})
            measured.append((space.chosen(changed), offset + probe.log_increase))
    catalogue = catalogue_of(space, workspace.spec.precision.activations)
    return before_any_trial(catalogue, surrogate.effects, measured)


def seeds(prepared: Prepared) -> list[Seed]:
    """The study's first maps: both ends, the presets, then the surrogate's predicted front."""
    space, spec = prepared.workspace.space, prepared.workspace.spec
    found: list[tuple[PrecisionMap, str]] = [
        (space.widest(), f"uniform {spec.precision.choices[0]}"),
        (space.lowest(), f"uniform {spec.precision.choices[-1]}"),
    ]
    four_bit = next((name for name in FOUR_BIT if name in spec.precision.choices), None)
    for name in PRESETS:
        if name != "cumulative" or four_bit is not None:
            preset = PrecisionMap.preset(name, space.components, four_bit=four_bit or FOUR_BIT[0])
            found.append((space.within(preset), name))
    named = [Seed(space.chosen(precision_map), origin) for precision_map, origin in found]
    budget = math.log1p(spec.search.budget_percent / 100)
    predicted = predicted_front(prepared.surrogate, prepared.knowledge.catalogue, spec.search.seeds, budget)
    return named + [Seed(params, "predicted front") for params in predicted]


def run_search(spec: StudySpec, run: RunDirectory, say: Say) -> Result:
    """Run or continue a study to its number of trials, then finish it: everything in the run directory."""
    with run.owned():
        prepared = prepare(spec, run, say)
        space = prepared.workspace.space
        choices = {component.name: space.choices[component.name] for component in space.free}
        study = open_study(spec, run, choices, prepared.workspace.fingerprint(), prepared.knowledge)
        again = recover(study, choices)
        if again:
            say(f"{again} interrupted trial{'s' if again > 1 else ''} will be tried again")
        enqueue(study, seeds(prepared), choices)
        reopened = reconsider(study, choices, spec.search.budget_percent)
        if reopened:
            say(f"{reopened} maps that were stopped as over a lower budget will be tried again")
        target = max(spec.search.trials, status(study).finished if reopened else 0) + reopened
        if status(study).finished < target:
            (run / CERTIFICATE).unlink(missing_ok=True)  # of a front that is about to change
        _trials(study, spec, choices, prepared, target)
        return _finish(study, prepared, run, say)


def _trials(
    study: Study, spec: StudySpec, choices: Mapping[str, tuple[str, ...]], prepared: Prepared, trials: int
) -> None:
    objective = Objective(prepared.workspace, prepared.baseline)
    space = prepared.workspace.space
    progress = Progress("trials", trials, len(points(study, space.choices)))

    def evaluate_params(params: Mapping[str, str]) -> Measured:
        if not spec.search.racing:
            return objective(space.map(params))
        return objective.race(space.map(params), finished_differences(study), spec.search.racing_error)

    def after(finished: bool) -> None:
        if finished:
            front = pareto_front(points(study, space.choices), spec.search.budget_percent)
            best = (
                f"best {front[0].compression:.2f}× at {front[0].increase_percent:+.2f} %"
                if front
                else "none within budget"
            )
            progress.step(best)

    run_trials(
        study, choices, evaluate_params, trials=trials, budget_percent=spec.search.budget_percent,
        sampler=spec.search.sampler, after=after,
    )  # fmt: skip
    progress.close()


def _finish(study: Study, prepared: Prepared, run: RunDirectory, say: Say) -> Result:
    """Front, certificate, export of the winner, plots, report."""
    workspace, baseline = prepared.workspace, prepared.baseline
    spec = workspace.spec
    found = points(study, workspace.space.choices)
    front = pareto_front(found, spec.search.budget_percent)
    certificate = certify_front(workspace, run, front, say)
    exported, failure = None, ""
    winner = next((p for p in front if certificate is not None and p.trial == certificate.winner), None)
    if winner is not None:
        say(f"exporting trial {winner.trial} and reading it back")
        try:
            exported = export(
                workspace, baseline, workspace.space.map(winner.map), run / WINNER,
                certificate=certificate, provenance={"trial": winner.trial}, replace=True,
            )  # fmt: skip
        except ArtifactError as error:  # the report must still say what was found, and that this failed
            failure = str(error)
            say(f"error: {failure}")
    else:
        shutil.rmtree(run / WINNER, ignore_errors=True)  # a former winner, which has lost
    run.write_json(CERTIFICATE, None if certificate is None else certificate.to_json())
    result = Result(
        spec=spec,
        components=workspace.space.components,
        pins=workspace.space.pins,
        baseline_perplexity=baseline.perplexity,
        baseline_bytes=baseline.bytes,
        points=found,
        front=front,
        status=status(study),
        surrogate=prepared.surrogate,
        prediction_error=prediction_error(prepared.knowledge, study),
        certificate=certificate,
        gates=judge(certificate, exported.facts if exported else None, failure),
        benchmark=exported.benchmark if exported else None,
        provenance=provenance_of(workspace),
    )
    draw(run, spec, result.components, found, prepared.probes, certificate, baseline.bytes)
    run.write_text(REPORT, render(result))
    run.write_json(FRONT, answer(result))
    return result


def certify_front(workspace: Workspace, run: RunDirectory, front: list[Point], say: Say) -> Certificate | None:
    """Hold the front against the budget on the certify windows, and note each new try in the run directory."""
    spec, windows = workspace.spec, workspace.splits.certify
    if not front:
        return None
    say(f"certifying on {len(windows)} windows")
    reference = evaluate(workspace.model, windows)

    def measure(point: Point) -> Increase:
        model = workspace.converter.convert(workspace.space.map(point.map))
        return paired_increase(evaluate(model, windows), reference)

    former = [Try(**line) for line in run.read_lines(TRIES)]
    certificate = certify(
        front,
        measure,
        budget_percent=spec.search.budget_percent,
        confidence=spec.search.confidence,
        windows_digest=windows.digest,
        former=former,
    )
    for tried in certificate.tries if certificate else ():
        if tried not in former:
            run.append_lines(TRIES, [asdict(tried)])
    return certificate


def draw(
    run: RunDirectory,
    spec: StudySpec,
    components: tuple[Component, ...],
    found: Sequence[Point],
    probes: Sequence[Probe],
    certificate: Certificate | None,
    baseline_bytes: int,
) -> list[Path]:
    """The study's pictures, PNG and SVG. The allocation is the winner's, or the smallest front map's where none won."""
    budget = spec.search.budget_percent
    winner = None if certificate is None else certificate.winner
    front = pareto_front(found, budget)
    picture = plots.plot_front(found, budget, winner, describe(certificate, bool(front)), baseline_bytes)
    paths = plots.save(picture, run.path, "front")
    if probes:
        paths += plots.save(plots.plot_sensitivities(probes, components), run.path, "sensitivities")
    shown = next((point for point in front if point.trial == winner), front[0] if front else None)
    if shown is not None:
        allocation = PrecisionMap(tuple(shown.map.items()))
        paths += plots.save(
            plots.plot_allocation(components, allocation, spec.precision.activations), run.path, "allocation"
        )
    return paths


def describe(certificate: Certificate | None, any_within: bool) -> str:
    """The certificate in one sentence, for titles; `any_within` tells an empty front from one not yet certified."""
    if certificate is None:
        return "Not certified yet." if any_within else "No map is within the budget on the search windows."
    return (
        f"{certificate.verdict.capitalize()} on {certificate.windows} unseen windows: "
        f"{certificate.increase_percent:+.2f} %, at most {certificate.upper_percent:+.2f} % "
        f"({100 * certificate.confidence:g} % confidence), budget {certificate.budget_percent:+g} %"
    )


def answer(result: Result) -> dict[str, Any]:
    """What `search` and `front` answer, with the gates."""
    certificate = None if result.certificate is None else result.certificate.to_json()
    baseline = {"perplexity": result.baseline_perplexity, "bytes": result.baseline_bytes}
    content = front_json(result.points, result.front, baseline, result.spec.search.budget_percent, certificate)
    return json.loads(json.dumps({**content, "gates": [gate.to_json() for gate in result.gates]}))  # type: ignore[no-any-return]
