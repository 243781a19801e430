"""Quality gates: is the result good enough to use? Each gate says pass, warn or fail, with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search.base.metric import PERPLEXITY, Metric
from search.results.certify import Certificate

GateVerdict = Literal["pass", "warn", "fail"]

GOOD_COMPRESSION, LEAST_COMPRESSION = 1.5, 1.3
GOOD_SPEEDUP, GATE_BATCH = 1.2, 32
MARKS: dict[GateVerdict, str] = {"pass": "✓", "warn": "!", "fail": "✗"}
"""A sign for each, so that no colour has to say it."""
_ORDER: tuple[GateVerdict, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Gate:
    """One question with its answer and the figures behind it."""

    name: str
    verdict: GateVerdict
    figures: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What the gates judge: measured on the exported artifact, read back from disk.

    speedup: None where it was not measured, and `untimed` says why not. read_back: what was evaluated of it.
    """

    compression: float
    speedup: float | None
    float32_arrays: int
    untimed: str = ""
    read_back: str = "same perplexity"


def overall(gates: Sequence[Gate]) -> GateVerdict:
    """The worst of the verdicts."""
    return max((gate.verdict for gate in gates), key=_ORDER.index, default="fail")


def judge(
    certificate: Certificate | None,
    facts: Facts | None,
    failure: str = "",
    runtime: Gate | None = None,
    metric: Metric = PERPLEXITY,
) -> list[Gate]:
    """All gates; `certificate` is None where no map is within the budget, `facts` where none was exported.

    failure: why the winner could not be exported and read back. runtime: what the target's runtime says of its file.
    """
    if certificate is None:
        return [Gate("quality", "fail", "no evaluated map is within the budget on the search windows")]
    gates = [_quality(certificate, metric)]
    if failure:
        return [*gates, Gate("loads", "fail", failure)]
    if facts is None:
        return gates
    return [
        *gates,
        _compression(facts.compression),
        _precision(facts),
        Gate("loads", "pass", f"re-read from disk, {facts.read_back}"),
        _speed(facts),
        *([] if runtime is None else [runtime]),
    ]


def _quality(certificate: Certificate, metric: Metric) -> Gate:
    of = f" of {certificate.clusters} documents" if certificate.basis == "documents" else ""
    figures = (
        f"{certificate.verdict}: {metric.said(certificate.increase_percent, 2)} on {certificate.windows} certify "
        f"windows{of}, upper bound {metric.said(certificate.upper_percent, 2)}, "
        f"budget {metric.budget(certificate.budget_percent)}"
    )
    shown, budget = (metric.shown(each) for each in (certificate.increase_percent, certificate.budget_percent))
    if certificate.verdict == "certified":
        return Gate("quality", "pass", figures)
    return Gate("quality", "fail" if shown > 2 * budget else "warn", figures)


def _compression(compression: float) -> Gate:
    verdict: GateVerdict = "pass"
    if compression < GOOD_COMPRESSION:
        verdict = "fail" if compression < LEAST_COMPRESSION else "warn"
    return Gate(
        "compression", verdict, f"{compression:.2f}× (≥ {GOOD_COMPRESSION} passes, < {LEAST_COMPRESSION} fails)"
    )


def _precision(facts: Facts) -> Gate:
    count = facts.float32_arrays
    return Gate("no FP32 left", "fail" if count else "pass", f"{count} float32 arrays in the file")


def _speed(facts: Facts) -> Gate:
    if facts.speedup is None:
        return Gate("speed", "warn", facts.untimed or "not measured")
    verdict: GateVerdict = "pass" if facts.speedup >= GOOD_SPEEDUP else "warn"
    return Gate("speed", verdict, f"{facts.speedup:.2f}× FP32, prefill at batch {GATE_BATCH} (< {GOOD_SPEEDUP} warns)")
