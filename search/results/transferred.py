"""A study's map, or an artifact, in another runtime's file, and what that runtime says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search.problem.splits import accompanying, tokenizer_json
from search.problem.workspace import Workspace
from search.results.certify import Certificate
from ssm_mp.artifact import ACCOMPANYING, Artifact
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.exportable import Exportable, with_inputs
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.transfer import Plan, Transferred, transfer

ASKED_WINDOWS = 4
"""Windows that a runtime is asked about."""
NOT_ASKED = "not verified: the runtime was not asked, as --no-verify says"


def transfer_map(  # noqa: PLR0913, an option of the command most of them
    workspace: Workspace,
    precision_map: PrecisionMap,
    format_: Format,
    out: Path,
    *,
    certificate: Certificate | None = None,
    provenance: Mapping[str, Any] | None = None,
    widen: bool = False,
    verify: bool = True,
    tokenizer: bool = True,
    replace: bool = False,
) -> Transferred:
    """Convert a map of the study and write it for another runtime, which is asked about windows of the certify split.

    Raises ExportError where the format does not hold it, DisagreementError where the runtime contradicts.
    """
    metric = workspace.spec.search.judged
    item = Exportable(
        workspace.spec.name, workspace.converter.convert(precision_map), precision_map, workspace.checkpoint.source,
        tokenizer_json(workspace.spec, workspace.checkpoint.config) if tokenizer else None,
        accompanying(workspace.spec),
    )  # fmt: skip

    def further(plan: Plan) -> Mapping[str, Any]:
        return {
            "map": precision_map.to_json(),
            "certificate": None if certificate is None else metric.answer(certificate.to_json()),
            "certificate_is_of_this_file": speaks_of(workspace, format_, plan),
            "provenance": dict(provenance or {}),
        }

    windows = asked_windows(workspace.splits.certify) if verify else None
    return transfer(
        format_, item, out, widen=widen, windows=windows, unverified=NOT_ASKED, replace=replace, further=further
    )


def transfer_artifact(
    artifact: Artifact,
    format_: Format,
    out: Path,
    windows: Windows | None,
    *,
    widen: bool,
    tokenizer: bool = True,
    unverified: str,
    replace: bool,
) -> Transferred:
    """Write an artifact's model for another runtime, which is asked about some of the windows."""
    content = artifact.tokenizer.read_bytes() if tokenizer and artifact.tokenizer is not None else None
    files = {name: (artifact.path / name).read_bytes() for name in ACCOMPANYING if (artifact.path / name).is_file()}
    item = Exportable(
        artifact.path.resolve().name, artifact.model, artifact.precision_map, artifact.source, content, files
    )
    asked = None if windows is None else asked_windows(windows)
    return transfer(
        format_, item, out, widen=widen, windows=asked, unverified=unverified, replace=replace,
        further=lambda _: {"map": artifact.precision_map.to_json()},
    )  # fmt: skip


def asked_windows(windows: Windows) -> np.ndarray:
    """The windows that a runtime is asked about: int64 `[w, l]`."""
    found: np.ndarray = windows.ids[:ASKED_WINDOWS].cpu().numpy()
    return found


def speaks_of(workspace: Workspace, format_: Format, plan: Plan) -> bool:
    """Whether what the study measured is what this file computes: it was for this format, and no value is another."""
    return workspace.spec.export.target == format_.word and not plan.widened and not plan.notes


def perplexity_on_search(workspace: Workspace, done: Transferred) -> float:
    """Our evaluation of the file's model, in its runtime's arithmetic, on the search windows."""
    return evaluate(with_inputs(done.item, done.format.inputs).model, workspace.splits.search).perplexity
