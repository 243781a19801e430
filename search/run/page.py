"""`report.html` of a run: its content, gathered from what the run directory holds, and its writing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import Study

from search.base.errors import StudyError
from search.measure.probe import Probe
from search.problem.run_directory import FINGERPRINT, FRONT, PAGE, PROVENANCE, RunDirectory
from search.problem.spec import StudySpec
from search.results.certify import Certificate
from search.results.gates import Gate
from search.results.page.content import PageContent
from search.results.page.document import render
from search.run.components import stored_components
from search.run.drift import stored_drift
from search.run.fidelity import stored_fidelity
from search.run.status import growth_of
from search.trials.read_back import asked_trials, points
from ssm_mp.runtimes.registry import get_format


def page_content(
    spec: StudySpec,
    run: RunDirectory,
    study: Study,
    probes: Sequence[Probe],
    baseline: Mapping[str, Any],
    certificate: Certificate | None,
    said: str,
) -> PageContent:
    """The page of a search as it stands. baseline: as answers have it; said: the certificate in a sentence.

    Raises StudyError where the run directory does not hold what the page needs.
    """
    search, metric = spec.search, spec.search.judged
    found = points(study, run.space())
    winner = None if certificate is None else certificate.winner
    fidelity = stored_fidelity(run, winner)
    return PageContent(
        name=spec.name,
        facts=_facts(spec, run),
        export=export_command(spec, run),
        export_winner=export_winner_command(spec, run),
        metric=metric,
        budget_percent=search.budget_percent,
        baseline=baseline,
        components=stored_components(run),
        points=found,
        probes=probes,
        growth=[
            (one.finished, one.hypervolume) for one in growth_of(study, run.space(), search.budget_percent, metric)
        ],
        certificate=certificate,
        said=said,
        asked=asked_trials(study, search.trials),
        target=spec.export.target,
        gates=_gates(run, len(found), winner),
        beside=() if fidelity is None else fidelity.lines(),
        provenance=run.read_json(PROVENANCE) or {"fingerprint": run.read_json(FINGERPRINT)},
        drift=stored_drift(run),
        groups=run.groups(),
    )


def write_page(run: RunDirectory, content: PageContent) -> Path:
    """Write `report.html`, whole or not at all."""
    run.write_text(PAGE, render(content))
    return run / PAGE


def export_command(spec: StudySpec, run: RunDirectory) -> tuple[str, str, str]:
    """The command that exports a trial of a run, from the folder where its search was started; the trial's number
    stands between the parts."""
    command, suffix = _export(spec, run)
    return f"{command} --pick ", f" --out {shlex.quote(f'exports/{spec.name}-trial-')}", suffix


def export_winner_command(spec: StudySpec, run: RunDirectory) -> str:
    """The command that exports the winner."""
    command, suffix = _export(spec, run)
    return f"{command} --out {shlex.quote(f'exports/{spec.name}{suffix}')}"


def _export(spec: StudySpec, run: RunDirectory) -> tuple[str, str]:
    """The command without what is exported and where to, and what its file's name ends in."""
    target = spec.export.target
    asked = [one for one in spec.overrides if not one.startswith(("search.trials=", "search.force_baseline="))]
    own = [] if run.path == RunDirectory.of(spec).path else ["--run-dir", str(run.path)]
    words = ["ssm-mp", "export", str(spec.path), *own, *(part for one in asked for part in ("--set", one))]
    words += [] if target is None else ["--format", target]
    return shlex.join(words), "" if target is None else get_format(target).suffix


def _facts(spec: StudySpec, run: RunDirectory) -> list[tuple[str, str]]:
    """What was searched, how, and where it is kept."""
    weights = "" if spec.checkpoint.weights is None else f", weights {spec.checkpoint.weights}"
    target = [] if spec.export.target is None else [("for", f"{spec.export.target} files")]
    return [
        ("study file", str(spec.path)),
        ("checkpoint", f"{spec.checkpoint.path}{weights}"),
        ("text", ", ".join(spec.data.texts)),
        ("choices", ", ".join(spec.precision.choices)),
        ("activations", spec.precision.activations),
        *target,
        ("sampler", f"{spec.search.sampler}, probes {spec.search.probe}"),
        ("run directory", str(run.path)),
    ]


def _gates(run: RunDirectory, trials: int, winner: int | None) -> list[Gate]:
    """The gates of the last end of the search; none where it has gone on since."""
    stored = run.read_json(FRONT)
    if not isinstance(stored, dict) or (stored.get("trials"), stored.get("winner")) != (trials, winner):
        return []
    try:
        return [Gate(**gate) for gate in stored.get("gates", [])]
    except TypeError as error:
        raise StudyError(f"{run / FRONT}: damaged ({error}); `ssm-mp search` writes it again") from None
