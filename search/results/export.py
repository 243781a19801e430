"""Export one map as an artifact folder: converted, written, re-read from disk and re-evaluated."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from search.base.fidelity import Fidelity
from search.base.metric import PERPLEXITY
from search.base.progress import slow
from search.measure.latency import summary
from search.measure.objective import Baseline, Measured, Objective
from search.problem.memory import too_large_to_time
from search.problem.source import source_of
from search.problem.splits import accompanying, tokenizer_json
from search.problem.workspace import Workspace
from search.results.certify import Certificate, bounds
from search.results.gates import GATE_BATCH, Facts
from search.results.ledger import finite_or_none
from search.results.plots.components import allocation_png
from search.results.reread import Expected, Reread, reread
from ssm_mp.artifact import (
    SOURCE,
    TOKENIZER,
    Artifact,
    add_metrics,
    require_free,
    save_artifact,
    stored_arrays,
    tensor_bytes,
)
from ssm_mp.artifact_folder import PICTURE
from ssm_mp.components import find_components, fp32_bytes
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluation.benchmark import Benchmark, benchmark, untimed
from ssm_mp.evaluation.latency import LatencyTable
from ssm_mp.model import LanguageModel, in_float32
from ssm_mp.precision_map import PrecisionMap

MOST_TIMING = 30.0
"""Seconds that timing a winner may take, whatever the search took: with writing and reading back it is a minute."""
_LEAST_TIMING = 5.0
"""Nobody waits for so long; a search of seconds would else leave nothing to time in."""

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


def timing_seconds(spent: float) -> float:
    """How long timing may take after a search of `spent` seconds: a tenth of it, within bounds."""
    return min(MOST_TIMING, max(_LEAST_TIMING, spent / 10))


def export(  # noqa: PLR0913, what is known of the map, each in its place
    workspace: Workspace,
    baseline: Baseline,
    precision_map: PrecisionMap,
    out: str | Path,
    *,
    known: Measured | None = None,
    certificate: Certificate | None = None,
    provenance: Mapping[str, Any] | None = None,
    replace: bool = False,
    latency: LatencyTable | None = None,
    seconds: float = MOST_TIMING,
    fidelity: Fidelity | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the artifact of a map and verify what is on disk.

    known: what a trial has measured of the map on all search windows; None: it is measured now. latency: the study's
    table, from which the map's latency is predicted. seconds: what timing may take. fidelity: what else is known of
    the map beside FP32.
    Raises ArtifactError where the folder cannot be written, or where what is read back is not what was measured.
    """
    require_free(out, replace)
    expected = Expected(known, None) if known is not None else _measured(workspace, baseline, precision_map)
    measured, model = expected.measured, workspace.converter.convert(precision_map)
    speed = _timed(workspace, model, seconds, say)
    scheme = workspace.spec.precision.scheme
    components = tuple(dataclasses.replace(one, sizes=()) for one in workspace.converter.components)
    predicted = precision_map.bytes(components, scheme.activations)  # of our own file, whatever the study's target
    metrics = {
        **_measured_metrics(workspace, baseline, measured, predicted),
        "certificate": workspace.spec.search.judged.answer(certificate.to_json()) if certificate else None,
        **({} if fidelity is None else {"fidelity": fidelity.to_json()}),
        "benchmark": speed.to_json(),
        **({} if latency is None else {"latency": _latency(latency, precision_map)}),
        "provenance": {**provenance_of(workspace), **(provenance or {})},
    }
    read = list[Reread]()

    def verify(folder: Path) -> None:
        try:
            read.append(reread(folder, model, workspace, baseline, expected, predicted))
        except ArtifactError as error:
            raise ArtifactError(
                f"{out}: what was read back is not what was measured, and was not kept: {error}"
            ) from None
        add_metrics(folder, {"read_back": read[0].to_json()})

    extra = {
        PICTURE: allocation_png(components, precision_map, scheme.activations), **_tokenizer(workspace),
        **_source(workspace), **accompanying(workspace.spec),
    }  # fmt: skip
    save_artifact(
        out, model, precision_map, scheme, metrics, pins=workspace.space.pins, extra=extra, replace=replace,
        verify=verify,
    )  # fmt: skip
    return _exported(Path(out), read[0], baseline, measured, speed, metrics, latency)


def _exported(
    out: Path, read: Reread, baseline: Baseline, measured: Measured, speed: Benchmark, metrics: Mapping[str, Any],
    latency: LatencyTable | None,
) -> Exported:  # fmt: skip
    """What was read back, now in its place."""
    found = read.artifact
    artifact = dataclasses.replace(
        found, path=out, metrics=metrics, tokenizer=None if found.tokenizer is None else out / found.tokenizer.name
    )
    largest = max(speed.prefill, key=lambda prefill: prefill.batch, default=None)
    facts = Facts(
        compression=baseline.bytes / artifact.tensor_bytes,
        speedup=None if largest is None or largest.batch < GATE_BATCH else largest.speedup,
        float32_arrays=sum(array.dtype == torch.float32 for array in stored_arrays(artifact.model).values()),
        untimed="; ".join(speed.left_out),
        read_back=read.sentence,
    )
    predicted_latency = None if latency is None else latency.predict(artifact.precision_map.to_json())
    return Exported(
        artifact, facts.compression, measured.perplexity, measured.increase.percent, speed, facts, predicted_latency,
        metrics.get("source_compression"),
    )  # fmt: skip


def _measured(workspace: Workspace, baseline: Baseline, precision_map: PrecisionMap) -> Expected:
    """A map of which no trial tells, measured now."""
    model = workspace.converter.convert(precision_map)
    progress = slow("measuring", workspace.judge.layer_calls(model))
    began = time.monotonic()
    found = Objective(workspace, baseline, progress.step)(precision_map)
    progress.close()
    return Expected(found, time.monotonic() - began)


def _timed(workspace: Workspace, model: LanguageModel, seconds: float, say: Callable[[str], None]) -> Benchmark:
    """Speed beside FP32, as far as it can be measured within so many seconds and the study's memory."""
    components, windows = find_components(workspace.model), workspace.splits.search
    tokens, config = GATE_BATCH * windows.length, workspace.model.config
    sizes = fp32_bytes(components), tensor_bytes(model)
    refused = too_large_to_time(workspace.memory, *sizes, tokens, config)
    if refused is not None:
        say(f"note: {refused}")
        return untimed(model, sizes[0], refused)
    progress = slow("timing", 100)
    found = benchmark(
        model, in_float32(workspace.model), windows, batches=(1, GATE_BATCH), seconds=seconds,
        progress=lambda share: progress.show(round(100 * share)),
    )  # fmt: skip
    progress.close()
    for line in found.left_out:
        say(f"note: {line}")
    return found


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
    found = {
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
    metric = workspace.spec.search.judged
    return metric.answer(found) | ({} if metric is PERPLEXITY else {"metric": metric.word})


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
