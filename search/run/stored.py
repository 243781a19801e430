"""What a run directory says of a search, read back: baseline, standing certificate, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.study import Study

from search.base.errors import StudyError
from search.base.front import Point, pareto_front
from search.measure.probe import GRADIENT, Probe, gathered, probe_from_stored
from search.problem.run_directory import BASELINE, CERTIFICATE, GROUPING, PROBES, RunDirectory, require_same
from search.problem.spec import StudySpec
from search.problem.workspace import study_checkpoint
from search.results.certify import Certificate, standing_certificate
from search.results.page.content import PageContent
from search.run.finish import describe, draw
from search.run.page import page_content
from search.trials.read_back import points
from ssm_mp.components import find_components
from ssm_mp.conversion.embedding_blocks import with_blocks
from ssm_mp.conversion.regroup import grouping_of


def stored_baseline(run: RunDirectory) -> dict[str, Any]:
    """Perplexity and bytes of the FP32 checkpoint. Raises StudyError where they were not measured."""
    baseline = run.read_json(BASELINE)
    if not isinstance(baseline, dict) or not {"perplexity", "bytes"} <= baseline.keys():
        raise StudyError(f"{run / BASELINE}: missing or damaged; `ssm-mp probe` or `search` writes it again")
    wanted = ("perplexity", "bytes", "source_bytes", "source_types")
    return {name: baseline[name] for name in wanted if name in baseline}


def stored_certificate(run: RunDirectory, spec: StudySpec, front: Sequence[Point]) -> Certificate | None:
    """The certificate, where it still answers the question that the study asks."""
    search, where = spec.search, str(run / CERTIFICATE)
    return standing_certificate(run.read_json(CERTIFICATE), front, search.budget_percent, search.confidence, where)


def stored_probes(run: RunDirectory, gradient: bool) -> list[Probe]:
    """The probes of one kind; of those of one end, component and precision the last, measured in the latest space."""
    stored = [probe_from_stored(line["probe"]) for line in run.read_lines(PROBES)]
    latest = {(probe.end, probe.component, probe.precision): probe for probe in stored}
    found = [probe for probe in latest.values() if (probe.end == GRADIENT) == gradient]
    return gathered(found, run.space(), run.groups()) if gradient else found


def content_now(spec: StudySpec, run: RunDirectory, study: Study) -> PageContent:
    """The page of a search as it stands, from what its run directory holds. Raises StudyError where it has not begun to
    measure, or was prepared by an older version."""
    front = pareto_front(points(study, run.space()), spec.search.budget_percent)
    certificate = stored_certificate(run, spec, front)
    said = describe(certificate, bool(front), spec.search.judged)
    probes = stored_probes(run, spec.search.probe == "gradient")
    return page_content(spec, run, study, probes, stored_baseline(run), certificate, said)


def redraw(spec: StudySpec, run: RunDirectory, study: Study) -> list[Path]:
    """Draw the pictures again. Raises StudyError where the checkpoint is not the one that was searched."""
    checkpoint = study_checkpoint(spec)
    asked = {"checkpoint": checkpoint.digest, GROUPING: grouping_of(checkpoint.config) or None}
    require_same(run.fingerprint(), asked, str(run.path))
    blocked = replace(checkpoint, config=with_blocks(checkpoint.config, spec.precision.embedding_blocks))
    found = points(study, run.space())
    certificate = stored_certificate(run, spec, pareto_front(found, spec.search.budget_percent))
    probes = stored_probes(run, spec.search.probe == "gradient")
    bytes_ = stored_baseline(run)["bytes"]
    return draw(run, spec, find_components(blocked), found, probes, certificate, bytes_, run.groups())
