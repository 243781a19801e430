"""`report.md`: what was run, the components, the front, the winner, its certificate, the gates, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.base.fidelity import Fidelity
from search.base.front import Point, fastest, hypervolume, hypervolume_with_latency
from search.base.metric import PERPLEXITY, Metric
from search.measure.latency import summary
from search.problem.groups import Groups
from search.problem.source import Source
from search.problem.spec import StudySpec
from search.results.certify import Certificate
from search.results.gates import MARKS, Gate, overall
from search.results.outlook import outlook
from search.results.tested import basis, head_of, order, rows_of
from search.sampling.surrogate import Surrogate
from search.trials.read_back import Counts
from ssm_mp.components import Component
from ssm_mp.evaluation.benchmark import Benchmark
from ssm_mp.evaluation.latency import LatencyTable
from ssm_mp.runtimes.transfer import Transferred

_MOST_MEMBERS = 4
"""Members of a group that the report names; of more, how many there are."""


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that a finished search knows.

    windows: sentences on the text's windows; doubt: what speaks against the baseline, where the search was forced.
    """

    spec: StudySpec
    components: tuple[Component, ...]
    pins: frozenset[str]
    baseline_perplexity: float
    baseline_bytes: int
    points: Sequence[Point]
    front: Sequence[Point]
    counts: Counts
    surrogate: Surrogate
    prediction_error: float | None
    certificate: Certificate | None
    gates: Sequence[Gate]
    benchmark: Benchmark | None
    provenance: Mapping[str, Any]
    latency: LatencyTable | None = None
    windows: Sequence[str] = ()
    doubt: str | None = None
    source: Source | None = None
    transferred: Transferred | None = None
    groups: Groups = field(default_factory=dict)
    fidelity: Fidelity | None = None

    @property
    def metric(self) -> Metric:
        """What maps were judged by."""
        return self.spec.search.judged

    @property
    def winner(self) -> Point | None:
        """The certified point."""
        trial = None if self.certificate is None else self.certificate.winner
        return next((point for point in self.points if point.trial == trial), None)


def component_rows(components: Sequence[Component], pins: frozenset[str]) -> list[dict[str, Any]]:
    """The component table, as `inspect` prints it."""
    total = sum(component.count for component in components)
    return [
        {
            "name": component.name,
            "kind": component.kind,
            "layer": component.layer,
            "parameters": component.count,
            "share": component.count / total,
            "pinned": component.name in pins,
        }
        for component in components
    ]


def front_json(
    points: Sequence[Point],
    front: Sequence[Point],
    baseline: Mapping[str, Any] | None,
    budget_percent: float,
    certificate: Mapping[str, Any] | None,
    latency: LatencyTable | None = None,
    outlook: Sequence[str] = (),
    metric: Metric = PERPLEXITY,
    fidelity: Fidelity | None = None,
) -> dict[str, Any]:
    """The answer of `search` and `front`; outlook: what is said about the certificate, in words."""
    quickest = None if latency is None else fastest(front)
    known = (
        {}
        if latency is None
        else {"latency": summary(latency), "fastest": None if quickest is None else quickest.trial}
    )
    return {
        "baseline": baseline,
        **metric.answer({"budget_percent": budget_percent}),
        "trials": len(points),
        "front": [point.to_json(metric) for point in front],
        "winner": None if certificate is None else certificate["winner"],
        "certificate": None if certificate is None else metric.answer(certificate),
        "outlook": list(outlook),
        **({} if metric is PERPLEXITY else {"metric": metric.word}),
        **({} if fidelity is None else {"fidelity": fidelity.to_json()}),
        **known,
    }


def render(result: Result) -> str:
    """The whole report as Markdown."""
    sections = [
        f"# Precision search: {result.spec.name}\n\n{_summary(result)}",
        f"![Pareto front](front.png)\n\n## Gates: {overall(result.gates)}\n\n{_gates(result.gates)}",
        f"## Front\n\n{_front(result)}",
        f"## Certificate\n\n{_certificate(result)}",
        f"## Winner\n\n{_winner(result)}",
        *([] if result.transferred is None else [f"## For {result.transferred.format.runtime}\n\n{_file(result)}"]),
        *([] if not result.groups else [f"## Groups\n\n{_groups(result)}"]),
        f"## Components\n\n{_components(result)}",
        f"## Sensitivities\n\n{_surrogate(result)}",
        *([] if result.latency is None else [f"## Latency\n\n{_latency(result.latency)}"]),
        *([] if not result.windows else [f"## Text\n\n{_text(result)}"]),
        f"## Provenance\n\n```json\n{json.dumps(result.provenance, indent=2)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(result: Result) -> str:
    spec = result.spec
    lines = [
        f"Checkpoint `{spec.checkpoint.path}`, {sum(c.count for c in result.components):,} parameters, "
        f"{result.baseline_bytes:,} bytes in FP32{_own_bytes(result)}, "
        f"perplexity {result.baseline_perplexity:.4f} on the search windows.",
        f"{result.counts.finished} precision maps were converted and evaluated, {result.counts.stopped} of them "
        f"stopped early ({result.counts.failed} failed), with "
        f"sampler `{spec.search.sampler}`, choices {', '.join(spec.precision.choices)}, activations "
        f"`{spec.precision.activations}`, budget {result.metric.budget(spec.search.budget_percent)}"
        + (
            "."
            if spec.export.target is None
            else f", for the bytes and the arithmetic of `{spec.export.target}` files."
        ),
    ]
    if result.doubt is not None:
        lines.append(f"**Forced:** {result.doubt}.")
    if result.winner is not None:
        point = result.winner
        smaller = f"{point.compression:.2f}× smaller"
        if result.source is not None:
            smaller = f"{point.compression:.2f}× of FP32, {result.source.told(point.bytes)}"
        lines.append(
            f"**Winner: trial {point.trial}, {smaller} ({point.bytes:,} bytes), "
            f"{result.metric.rises} {result.metric.said(point.increase_percent, 2)}** on the search windows."
        )
        if result.latency is not None and point.latency is not None:
            lines[-1] += (
                f" Predicted latency {1e3 * point.latency:.3f} ms, {result.latency.fp32 / point.latency:.2f} × as fast "
                "as FP32."
            )
    else:
        lines.append("**No map was certified.**")
    return "\n\n".join(lines)


def _text(result: Result) -> str:
    """The text and its windows."""
    named = ", ".join(f"`{name}`" for name in result.spec.data.texts)
    return "\n".join(f"- {line}." for line in (named, *result.windows))


def _own_bytes(result: Result) -> str:
    source = result.source
    return "" if source is None else f" and {source.bytes:,} in the file's own {' and '.join(source.types)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _gates(gates: Sequence[Gate]) -> str:
    rows = [(f"{MARKS[gate.verdict]} {gate.verdict}", gate.name, gate.figures) for gate in gates]
    return _table(("verdict", "gate", "figures"), rows, left=3)


def _front(result: Result) -> str:
    rows = [
        (
            str(point.trial),
            point.origin,
            f"{point.compression:.3f}×",
            *([] if result.source is None else [f"{result.source.bytes / point.bytes:.3f}×"]),
            f"{point.bytes:,}",
            f"{point.perplexity:.4f}",
            result.metric.interval(point.increase_percent, point.stderr_percent, 3),
            f"{sum(precision != 'fp16' for precision in point.map.values())} of {len(point.map)}",
            *([] if point.latency is None else [f"{1e3 * point.latency:.3f}"]),
        )
        for point in result.front
    ]
    own = [] if result.source is None else ["of the file"]
    head = ["trial", "from", "compression", *own, "bytes", "perplexity", f"{result.metric.head} (95 %)", "below fp16"]
    head += [] if result.latency is None else ["latency ms"]
    if not rows:
        return "No evaluated map is within the budget."
    budget = result.spec.search.budget_percent
    area = hypervolume(result.points, budget, metric=result.metric)
    unit = "percentage points" if result.metric is PERPLEXITY else result.metric.unit
    text = (
        _table(head, rows, left=2)
        + f"\n\nHypervolume {area:.{4 + result.metric.digits}f}: compression above 1× times {unit} below the budget."
    )
    if result.latency is None:
        return text
    volume = hypervolume_with_latency(result.points, budget, result.latency.reference, result.metric)
    return text + (
        f" With latency {volume:.{4 + result.metric.digits}f}: that times the fraction of "
        f"{1e3 * result.latency.reference:.3f} ms saved."
    )


def _certificate(result: Result) -> str:
    certificate = result.certificate
    if certificate is None:
        return "Nothing to certify: no map is within the budget on the search windows."
    said = "".join(f"\n\n{line}" for line in outlook(certificate))
    table = _table(head_of(result.metric), rows_of(certificate, result.metric), left=2)
    return (
        f"**{certificate.verdict}** at {100 * certificate.confidence:g} % over all that the study tests, on "
        f"{certificate.windows} windows that the search never saw, paired against the FP32 checkpoint. "
        f"{basis(certificate)}{said}\n\n{order(certificate)}\n\n{table}"
    )


def _winner(result: Result) -> str:
    if result.winner is None:
        return "None."
    text = "![Allocation](allocation.png)\n\nThe artifact is in `winner/`, re-read from disk and re-evaluated."
    if result.fidelity is not None:
        said = "\n".join(f"- {line}" for line in result.fidelity.lines())
        text += f"\n\nBeside perplexity, on the certify windows (± 95 %):\n\n{said}"
    if result.benchmark is None:
        return text
    figures = result.benchmark
    pairs: list[tuple[str, float, float, float]] = [
        ("stored bytes", figures.stored_bytes, figures.fp32_bytes, figures.stored_bytes / figures.fp32_bytes),
        (
            "resident bytes",
            figures.resident_bytes,
            figures.fp32_resident_bytes,
            figures.resident_bytes / figures.fp32_resident_bytes,
        ),
    ]
    pairs += [
        (f"tokens/s, prefill, batch {p.batch}", p.tokens_per_second, p.fp32_tokens_per_second, p.speedup)
        for p in figures.prefill
    ]
    pairs += [
        (f"tokens/s, decode, batch {d.batch}", d.tokens_per_second, d.fp32_tokens_per_second, d.speedup)
        for d in figures.decode
    ]
    rows = [(name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ratio:.3f}") for name, ours, theirs, ratio in pairs]
    left_out = "".join(f"\n\n{line[0].upper()}{line[1:]}." for line in figures.left_out)
    return text + "\n\n" + _table(("", "winner", "FP32", "ratio"), rows) + left_out


def _file(result: Result) -> str:
    """The winner's file for the study's target: what it is, what its runtime says, how each kind of tensor is held."""
    done = result.transferred
    assert done is not None
    said = done.unverified if done.verdict is None else done.verdict.sentence
    held: dict[tuple[str, str], list[int]] = {}
    for component in done.item.components:
        encoding = done.plan.encodings[component.name]
        held.setdefault((component.kind, encoding.word), []).append(encoding.bytes)
    rows = [(kind, word, str(len(sizes)), f"{sum(sizes):,}") for (kind, word), sizes in held.items()]
    rates = ""
    if done.verdict is not None:
        rates = f", {done.verdict.rate:,.0f} tokens a second ({done.verdict.rate_here:,.0f} here)"
    lines = [
        f"`{done.path.name}`: {done.plan.bytes:,} bytes of tensors, as predicted, {done.file_bytes:,} in the file, "
        f"{result.baseline_bytes / done.plan.bytes:.2f}× smaller than FP32. **{said[0].upper()}{said[1:]}**{rates}.",
        *(f"Not bit for bit: {note}." for note in done.plan.notes),
        f"```\n{done.command}\n```",
        _table(("kind", "stored as", "components", "bytes"), rows, left=2),
    ]
    return "\n\n".join(lines)


def _latency(table: LatencyTable) -> str:
    error = table.error
    rows = [
        (f"{1e3 * check.measured:.3f}", f"{1e3 * check.predicted:.3f}", f"{check.predicted / check.measured - 1:+.1%}")
        for check in sorted(table.checks, key=lambda check: check.measured)
    ]
    return (
        f"One prefill, batch {table.batch}, length {table.length}, on `{table.device}`, threads: {table.threads}; "
        f"medians of {table.rounds} rounds. FP32 takes {1e3 * table.fp32:.3f} ms. A map's latency is predicted: "
        f"{1e3 * table.rest:.3f} ms, which no precision changes, and each component's own time at its precision "
        "(`latency.json`).\n\n"
        f"On {len(table.checks)} other maps, really converted and measured in the same rounds, the prediction is off "
        f"by {error.median:.1%} (median) and {error.worst:.1%} (worst); rank correlation {error.spearman:.2f}.\n\n"
        + _table(("measured ms", "predicted ms", "error"), rows, left=0)
    )


def _components(result: Result) -> str:
    held = {} if result.winner is None else dict(result.winner.map)
    rows = [
        (
            f"`{row['name']}`", row["kind"], f"{row['parameters']:,}", f"{row['share']:.2%}",
            "pinned" if row["pinned"] else "", held.get(row["name"], "fp16" if held else ""),
        )
        for row in component_rows(result.components, result.pins)
    ]  # fmt: skip
    return _table(("component", "kind", "parameters", "share", "", "winner"), rows, left=2)


def _groups(result: Result) -> str:
    """What moves together, with its members."""
    held = {} if result.winner is None else dict(result.winner.map)
    count = {component.name: component.count for component in result.components}
    total, alone = sum(count.values()), set(count) - {m for members in result.groups.values() for m in members}
    rows = [
        (
            f"`{name}`", ", ".join(f"`{member}`" for member in members[:_MOST_MEMBERS])
            + (f" and {len(members) - _MOST_MEMBERS} more" if len(members) > _MOST_MEMBERS else ""),
            str(len(members)), f"{sum(count[member] for member in members) / total:.2%}",
            held.get(members[0], ""),
        )
        for name, members in result.groups.items()
    ]  # fmt: skip
    said = f"By `{_rule(result.spec)}`, components that move together; {len(alone)} others are in no group.\n\n"
    return said + _table(("group", "members", "", "share", "winner"), rows, left=2)


def _rule(spec: StudySpec) -> str:
    """The study's key for groups."""
    precision = spec.precision
    return f"groups = {list(precision.groups)}" if precision.groups else f'group = "{precision.group}"'


def _surrogate(result: Result) -> str:
    surrogate = result.surrogate
    learned = ""
    if result.prediction_error is not None:
        learned = (
            " With pair terms and all trials, the surrogate predicts each trial from the others to within "
            f"{result.metric.said_log(result.prediction_error, 3, '')} (root mean square)."
        )
    if result.spec.search.probe == "none":
        return "Nothing was probed: effects were expected in proportion to size, and learned from the trials." + learned
    return (
        "![Sensitivities](sensitivities.png)\n\nThe effects of the probes are added up to predict other maps. "
        "For the lowest map the sum is off by "
        f"{result.metric.said_log(surrogate.gap, 3)} of {result.metric.rises} (measured minus predicted).{learned}"
    )
