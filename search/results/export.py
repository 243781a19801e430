"""Export one map as an artifact folder: converted, written, re-read from disk and re-evaluated."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from search.measure.latency import summary
from search.measure.objective import Baseline, Measured, Objective
from search.problem.source import source_of
from search.problem.splits import accompanying, tokenizer_json
from search.problem.workspace import Workspace
from search.results.certify import Certificate, bounds
from search.results.gates import Facts
from search.results.ledger import finite_or_none
from search.results.plots.components import allocation_png
from ssm_mp.artifact import SOURCE, TOKENIZER, Artifact, read_artifact, require_free, save_artifact, stored_arrays
from ssm_mp.artifact_folder import PICTURE
from ssm_mp.components import find_components
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluation.benchmark import Benchmark, benchmark
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.evaluation.latency import LatencyTable
from ssm_mp.precision_map import PrecisionMap

_VERSIONS = ("torch", "optuna", "numpy", "scipy", "safetensors")


@dataclass(frozen=True, eq=False)
class Exported:
    """A written artifact, as it was found when read back.

    latency: predicted, in seconds, where it is asked for. source_compression: over the checkpoint's own bytes, where
    they are not those of FP32.
    """

    artifact: Artifact
    compression: float
    perplexity: float
    increase_percent: float
    benchmark: Benchmark
    facts: Facts
    latency: float | None = None
    source_compression: float | None = None


def export(
    workspace: Workspace,
    baseline: Baseline,
    precision_map: PrecisionMap,
    out: str | Path,
    *,
    certificate: Certificate | None = None,
    provenance: Mapping[str, Any] | None = None,
    replace: bool = False,
    latency: LatencyTable | None = None,
) -> Exported:
    """Write the artifact of a map and verify what is on disk.

    latency: the study's table, from which the map's latency is predicted.
    Raises ArtifactError where the folder cannot be written, or where what is read back is not what was measured.
    """
    require_free(out, replace)
    measured = Objective(workspace, baseline)(precision_map)
    model = workspace.converter.convert(precision_map)
    speed = benchmark(model, workspace.model, workspace.splits.search)
    scheme, components = workspace.spec.precision.scheme, find_components(workspace.model)
    predicted = precision_map.bytes(components, scheme.activations)  # of our own file, whatever the study's target
    metrics = {
        **_measured_metrics(workspace, baseline, measured, predicted),
        "certificate": certificate.to_json() if certificate else None,
        "benchmark": speed.to_json(),
        **({} if latency is None else {"latency": _latency(latency, precision_map)}),
        "provenance": {**provenance_of(workspace), **(provenance or {})},
    }

    def verify(folder: Path) -> None:
        artifact = read_artifact(folder, device=workspace.spec.search.device)
        found = evaluate(artifact.model, workspace.splits.search).perplexity
        if found != measured.perplexity or artifact.tensor_bytes != predicted:
            raise ArtifactError(
                f"{out}: what was read back is not what was measured, and was not kept: perplexity {found!r} for "
                f"{measured.perplexity!r}, {artifact.tensor_bytes} bytes for {predicted}"
            )

    extra = {
        PICTURE: allocation_png(components, precision_map, scheme.activations), **_tokenizer(workspace),
        **_source(workspace), **accompanying(workspace.spec),
    }  # fmt: skip
    save_artifact(
        out, model, precision_map, scheme, metrics, pins=workspace.space.pins, extra=extra, replace=replace,
        verify=verify,
    )  # fmt: skip
    artifact = read_artifact(out, device=workspace.spec.search.device)
    facts = Facts(
        compression=baseline.bytes / artifact.tensor_bytes,
        speedup=max(speed.prefill, key=lambda prefill: prefill.batch).speedup,
        float32_arrays=sum(array.dtype == torch.float32 for array in stored_arrays(artifact.model).values()),
    )
    predicted_latency = None if latency is None else latency.predict(precision_map.to_json())
    return Exported(
        artifact, facts.compression, measured.perplexity, measured.increase.percent, speed, facts, predicted_latency,
        metrics.get("source_compression"),
    )  # fmt: skip


def _tokenizer(workspace: Workspace) -> dict[str, bytes]:
    """The file that lets an artifact read text by itself."""
    content = tokenizer_json(workspace.spec, workspace.checkpoint.config)
    return {} if content is None else {TOKENIZER: content}


def _source(workspace: Workspace) -> dict[str, bytes]:
    """The checkpoint's own config, which other runtimes' files need."""
    values = workspace.checkpoint.source
    try:
        return {SOURCE: json.dumps(values, indent=2).encode()} if values else {}
    except (TypeError, ValueError):  # a pickled config may hold what JSON does not
        return {}


def _measured_metrics(workspace: Workspace, baseline: Baseline, measured: Measured, size: int) -> dict[str, Any]:
    """Sizes of a file of `size` bytes and perplexities, with the interval of the increase."""
    lower, upper = bounds(measured.increase, 1 - workspace.spec.search.confidence)
    source = source_of(workspace.checkpoint)
    own = {} if source is None else {**source.to_json(), "source_compression": source.bytes / size}
    return {
        "fp32_bytes": baseline.bytes,
        "compression": baseline.bytes / size,
        **own,
        "baseline_perplexity": baseline.perplexity,
        "perplexity": measured.perplexity,
        "increase_percent": measured.increase.percent,
        "stderr_percent": measured.increase.stderr_percent,
        "increase_interval_percent": [finite_or_none(lower), finite_or_none(upper)],
        "windows": measured.increase.windows,
    }


def _latency(table: LatencyTable, precision_map: PrecisionMap) -> dict[str, Any]:
    """A map's predicted latency, with what it is a latency of, and how far predictions are off."""
    return {"predicted_seconds": table.predict(precision_map.to_json()), **summary(table)}


def provenance_of(workspace: Workspace) -> dict[str, Any]:
    """Where a result comes from: fingerprint, study, versions."""
    return {
        "study": workspace.spec.name,
        "checkpoint": workspace.spec.checkpoint.path,
        "text": workspace.spec.data.text,
        "fingerprint": workspace.fingerprint() | {"certify windows": workspace.splits.certify.digest},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
    }
