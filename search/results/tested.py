"""What a report says of the maps that were tested: the verdict's basis, the order, each test with both bounds."""

from __future__ import annotations

from search.base.clustered import LEAST_CLUSTERS
from search.results.certify import Certificate
from search.results.ledger import Try

HEAD = ("trial", "verdict", "sequence", "error", "windows", "increase %", "over windows ≤ %", "over documents ≤ %")
"""Of `rows_of`; two columns of text."""


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


def rows_of(certificate: Certificate) -> list[tuple[str, ...]]:
    """A line for each tested map, the smallest first."""
    return [
        (
            str(tried.trial), tried.verdict + (", stopped early" if tried.stopped else ""),
            "alone" if tried.sequence is None else str(tried.sequence), f"{100 * tried.level:.3g} %",
            f"{tried.windows}", f"{tried.increase_percent:+.3f}", _upper(tried.upper_by_windows, tried, "windows"),
            _upper(tried.upper_by_clusters, tried, "documents"),
        )
        for tried in certificate.tries
    ]  # fmt: skip


def _upper(bound: float | None, tried: Try, basis: str) -> str:
    """An upper bound in percent; the verdict's in bold."""
    if tried.basis == basis:
        return f"**{tried.upper_percent:+.3f}**"
    return "–" if bound is None else f"{bound:+.3f}"
