"""What a report says of the maps that were tested: the verdict's basis, the order, each test with both bounds."""

from __future__ import annotations

from search.base.clustered import LEAST_CLUSTERS
from search.base.metric import PERPLEXITY, Metric
from search.results.certify import Certificate
from search.results.ledger import Try


def head_of(metric: Metric) -> tuple[str, ...]:
    """Of `rows_of`; two columns of text."""
    unit = metric.unit
    return (
        "trial", "verdict", "sequence", "error", "windows", metric.head, f"over windows ≤ {unit}",
        f"over documents ≤ {unit}",
    )  # fmt: skip


def basis(certificate: Certificate) -> str:
    """What the verdict's bounds treat as independent, in a sentence."""
    if certificate.basis == "documents":
        return (
            f"Its bounds are over the {certificate.clusters} documents (or stretches of one text) that these windows "
            "come from, so they speak of other documents like these; those over windows, of other windows of the same "
            "documents, are beside them."
        )
    if certificate.clusters is None:
        return "Its bounds are over windows: which documents they come from is not known."
    return (
        f"Its bounds are over windows: {certificate.clusters} documents, fewer than {LEAST_CLUSTERS}, say too little "
        "of others, so they speak of other windows of the same documents."
    )


def order(certificate: Certificate) -> str:
    """In which order maps were tested, and which were not reached."""
    if not certificate.planned:
        return "Each map spent a share of the error by itself, in the order of version 0.5."
    tested = {tried.trial for tried in certificate.tries}
    listed = " → ".join(str(trial) for trial in certificate.planned)
    left = sum(trial not in tested for trial in certificate.planned)
    said = (
        f"Tested from the map that the search windows call safe to the smallest, trials {listed}: each only after all "
        "before it were certified, so all of them share one error."
    )
    return said + (f" {left} of them were not reached." if left else "")


def rows_of(certificate: Certificate, metric: Metric = PERPLEXITY) -> list[tuple[str, ...]]:
    """A line for each tested map, the smallest first."""
    return [
        (
            str(tried.trial), tried.verdict + (", stopped early" if tried.stopped else ""),
            "alone" if tried.sequence is None else str(tried.sequence), f"{100 * tried.level:.3g} %",
            f"{tried.windows}", _shown(tried.increase_percent, metric),
            _upper(tried.upper_by_windows_percent, tried, "windows", metric),
            _upper(tried.upper_by_documents_percent, tried, "documents", metric),
        )
        for tried in certificate.tries
    ]  # fmt: skip


def _upper(bound: float | None, tried: Try, basis: str, metric: Metric) -> str:
    """An upper bound; the verdict's in bold."""
    if tried.basis == basis:
        return f"**{_shown(tried.upper_percent, metric)}**"
    return "–" if bound is None else _shown(bound, metric)


def _shown(percent: float, metric: Metric) -> str:
    return f"{metric.shown(percent):+.{3 + metric.digits}f}"
