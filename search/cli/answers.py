"""Answers of the command line as text for people, to be printed on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search.base.clock import clock
from search.base.fidelity import fidelity_from_json
from search.base.metric import METRICS, PERPLEXITY, Metric
from search.cli.tables import table

_NOT_HELD = "-"


def inspected(answer: Mapping[str, Any]) -> str:
    """The model and its component table."""
    rows = [
        (
            row["name"], row["kind"], "" if row["layer"] is None else str(row["layer"]), f"{row['parameters']:,}",
            f"{row['share']:.2%}", "pinned" if row["pinned"] else "",
        )
        for row in answer["components"]
    ]  # fmt: skip
    head = (
        f"family {answer['family']}, layout {answer['layout']}, {answer['parameters']:,} parameters, "
        f"{answer['fp32_bytes']:,} bytes in FP32"
    )
    types = answer["file_types"]
    said = next(iter(types)) if len(types) == 1 else ", ".join(f"{n:,} {name}" for name, n in types.items())
    head += f", {answer['file_bytes']:,} in the file ({said})"
    config = ", ".join(
        f"{key} {_short(value)}" for key, value in answer["config"].items() if key not in ("family", "layers")
    )
    layers = "".join(f"{line}\n" for line in _layers(answer["config"].get("layers", ())))
    return f"{head}\n{config}\n{layers}\n" + table(
        ("component", "kind", "layer", "parameters", "share", ""), rows, left=2
    )


_NOT_SHOWN = ("word", "d_model", "names")


def _layers(layers: Sequence[Any]) -> Iterator[str]:
    """A line for each different layer of a model that is spelt out block by block: which they are, and its blocks."""
    alike: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        if isinstance(layer, list):
            alike.setdefault("; ".join(_block(part) for branch in layer for part in branch["parts"]), []).append(i)
    for said, numbers in alike.items():
        yield f"layer{'s' if len(numbers) > 1 else ''} {_few_numbers(numbers)}: {said}"


def _block(part: Mapping[str, Any]) -> str:
    """One block: its name, its kind, and whatever is not left at nothing."""
    block = part["block"]
    said = [f"{key} {_short(value)}" for key, value in block.items() if key not in _NOT_SHOWN and _is_something(value)]
    return f"{part['name']} ({block['word']}: {', '.join(said)})"


def _is_something(value: object) -> bool:
    return value is not None and value is not False and not (isinstance(value, float) and value == 1.0)


def _short(value: object) -> object:
    """A value on its own, or of a dictionary what is not left at nothing."""
    if not isinstance(value, Mapping):
        return value
    return "/".join(f"{_short(inside)}" for inside in value.values() if _is_something(inside))


def _few_numbers(numbers: Sequence[int], most: int = 12) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def probed(answer: Mapping[str, Any]) -> str:
    """Sensitivities, the costliest lowering first."""
    metric = _metric(answer)
    rise, error, digits = metric.key("increase"), metric.key("stderr"), 4 + metric.digits
    rows = [
        (
            row["component"], f"{row['from']} → {row['precision']}", f"{row[rise]:+.{digits}f}",
            f"{1.96 * row[error]:.{digits}f}", "-" if row["kl"] is None else f"{row['kl']:.2e}",
        )
        for row in sorted(answer["probes"], key=lambda row: -row[rise])
    ]  # fmt: skip
    return table(("component", "change", f"increase {metric.unit}", "± 95 %", "KL (nats)"), rows, left=2)


def _metric(answer: Mapping[str, Any]) -> Metric:
    """What maps were judged by."""
    return METRICS[answer.get("metric", PERPLEXITY.word)]


def fronted(answer: Mapping[str, Any]) -> str:
    """The front as a table, the winner and its certificate."""
    winner, baseline, metric = answer["winner"], answer["baseline"], _metric(answer)
    digits = 3 + metric.digits
    own = baseline.get("source_bytes")
    rows = [
        (
            ("* " if point["trial"] == winner else "  ") + str(point["trial"]), point["origin"],
            f"{point['compression']:.3f}×", *([f"{own / point['bytes']:.3f}×"] if own else []),
            f"{point['bytes']:,}", f"{point['perplexity']:.4f}",
            f"{point[metric.key('increase')]:+.{digits}f}", f"{1.96 * point[metric.key('stderr')]:.{digits}f}",
            *([f"{1e3 * point['latency_seconds']:.3f}"] if "latency_seconds" in point else []),
        )
        for point in answer["front"]
    ]  # fmt: skip
    latency = answer.get("latency")
    head = ["  trial", "from", "compression", *(["of the file"] if own else []), "bytes", "perplexity"]
    head += [metric.head, "± 95 %"]
    head += [] if latency is None else ["latency ms"]
    in_file = f" ({own:,} in the file's own {' and '.join(baseline['source_types'])})" if own else ""
    lines = [
        f"{answer['trials']} trials; FP32 perplexity {baseline['perplexity']:.4f}, {baseline['bytes']:,} bytes"
        f"{in_file}; "
        f"budget {answer[metric.key('budget')]:g} {metric.unit}",
        table(head, rows, left=2) if rows else "no evaluated map is within the budget",
    ]
    if latency is not None:
        error = latency["prediction_error"]
        lines.append(
            f"latency of a prefill, batch {latency['batch']}, length {latency['length']}: FP32 "
            f"{1e3 * latency['fp32_seconds']:.3f} ms; predictions are off by {error['median']:.1%} (median), "
            f"{error['worst']:.1%} (worst of {error['maps']} maps), rank correlation {error['spearman']:.2f}"
        )
        lines += [] if answer["fastest"] is None else [f"fastest: trial {answer['fastest']}"]
    certificate = answer["certificate"]
    if certificate is not None:
        of = f" of {certificate['clusters']} documents" if certificate.get("basis") == "documents" else ""
        lines.append(
            f"{certificate['verdict']}: {_figure(certificate[metric.key('increase')], digits)} {metric.unit} "
            f"on {certificate['windows']} unseen windows{of}, at most "
            f"{_figure(certificate[metric.key('upper')], digits)} {metric.unit}"
        )
        lines += answer.get("outlook", [])
    if "fidelity" in answer:
        lines += fidelity_from_json(answer["fidelity"]).lines()
    lines += [f"{gate['verdict']:>4}  {gate['name']}: {gate['figures']}" for gate in answer.get("gates", [])]
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    """A figure that may be infinite, which JSON says as null."""
    return "+inf" if value is None else f"{value:+.{digits}f}"


def listed(answer: Mapping[str, Any]) -> str:
    """Plain answers, a line a key."""
    width = max(len(key) for key in answer)
    return "\n".join(f"{key.ljust(width)}  {_shown(value)}" for key, value in answer.items() if key != "map")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def launched(answer: Mapping[str, Any]) -> str:
    """What was submitted, and what to do next."""
    jobs = answer["jobs"]
    return "\n".join(
        (
            f"prepare  {jobs['prepare']}",
            f"search   {jobs['search']}  ({answer['workers']} workers)",
            f"finish   {jobs['finish']}",
            f"logs     {answer['logs']}",
            f"watch it   {answer['status']} --watch",
            f"end it     {answer['cancel']}",
        )
    )


def foretold(answer: Mapping[str, Any]) -> str:
    """What a search will take."""
    maps = f"{answer['maps']:,}" if answer["maps"] is not None else f"about 10^{answer['log10_maps']:.0f}"
    parts = ", ".join(f"{name} {clock(seconds)}" for name, seconds in answer["seconds"].items() if seconds >= 1)
    moving = answer["components"] - answer["pinned"]
    grouped = "" if answer["moves"] == moving else f" in {answer['moves']} groups"
    return "\n".join(
        (
            f"components  {answer['components']}, {moving} of them free to move{grouped}, {answer['pinned']} pinned",
            f"space       {maps} maps",
            f"to measure  {answer['probes']} probes, {answer['trials']} of {answer['asked']} trials",
            f"time        about {clock(answer['total_seconds'])}, mostly less: maps share layers, and clear losers are "
            "stopped",
            f"            {parts}",
            f"            from: {answer['basis']}",
            f"memory      {answer['memory']}",
            f"FP32        perplexity about {answer['perplexity']:.2f} on those windows",
        )
    )


def stood(answer: Mapping[str, Any]) -> str:
    """How a search stands."""
    lines = [_counted(answer)]
    for step, states in answer["jobs"].items():
        lines.append(f"{step:<8} " + (", ".join(f"{n} {state.lower()}" for state, n in states.items()) or "over"))
    if answer["running"]:
        rows = [(row["worker"], row["node"], str(row["trial"]), clock(row["seconds"])) for row in answer["running"]]
        lines += ["", table(("worker", "node", "trial", "since"), rows, left=2)]
    if answer["reasons"]:
        lines += ["", *(f"{number:>4} failed: {reason}" for reason, number in answer["reasons"].items())]
    best, metric = answer["best"], _metric(answer)
    if best is not None:
        rise = f"{best[metric.key('increase')]:+.{3 + metric.digits}f} {metric.unit}"
        lines += ["", f"best: trial {best['trial']}, {best['compression']:.3f}×, {rise}"]
    if answer["growth"]:
        digits = 4 + metric.digits
        grown = [
            (clock(g["seconds"]), str(g["finished"]), f"{g['hypervolume']:.{digits}f}") for g in _few(answer["growth"])
        ]
        lines += ["", table(("time", "finished", "hypervolume"), grown, left=0)]
    return "\n".join(lines)


def _counted(answer: Mapping[str, Any]) -> str:
    parts = [f"{answer['finished']} of {answer['asked']} finished"]
    if answer["stopped"]:
        parts.append(f"{answer['stopped']} of them stopped early")
    parts += [f"{len(answer['running'])} running", f"{answer['waiting']} queued", f"{answer['failed']} failed"]
    if answer["trials_per_hour"] is not None:
        parts.append(f"{answer['trials_per_hour']:,.0f} an hour")
    if answer["seconds_left"]:
        parts.append(f"{clock(answer['seconds_left'])} left")
    return ", ".join(parts)


def _few(growth: Sequence[Any], most: int = 8) -> list[Any]:
    """At most so many of a long list, the first and the last among them."""
    if len(growth) <= most:
        return list(growth)
    return [growth[round(i * (len(growth) - 1) / (most - 1))] for i in range(most)]


def formatted(answer: Mapping[str, Any]) -> str:
    """Export formats, and for a checkpoint what each holds of it, in how many bytes."""
    parts = []
    for found in answer["formats"]:
        lines = [f"{found['format']}: {found['runtime']}, {found['here']}"]
        if found.get("refused"):
            lines.append(f"  refused: {found['refused']}")
        if found.get("rows"):
            lines += _capabilities(found["rows"])
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _capabilities(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How a format holds components, a line each; precisions that it holds alike share a column, and those that it
    never holds are named below."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in rows[0]["precisions"]:
        alike.setdefault(tuple(_encoded(row["precisions"][name]) for row in rows), []).append(name)
    never = [name for column, names in alike.items() if set(column) == {_NOT_HELD} for name in names]
    columns = {" ".join(names): column for column, names in alike.items() if set(column) != {_NOT_HELD}}
    about = [(row["kind"], str(row["row"]), str(row["components"])) for row in rows]
    lines = [(*one, *held) for one, *held in zip(about, *columns.values(), strict=True)]
    found = [table(("kind", "row", "components", *columns), lines)]
    return [*found, f"  never: {', '.join(never)}"] if never else found


def _encoded(held: Mapping[str, Any] | None) -> str:
    return _NOT_HELD if held is None else f"{held['as']} {held['bytes']:,}{' *' if held['note'] else ''}"
