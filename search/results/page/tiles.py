"""The figures at the top of the page: winner, increase, certificate, budget, trials, gates."""

from __future__ import annotations

from dataclasses import dataclass

from search.results.gates import overall
from search.results.page.content import PageContent


@dataclass(frozen=True)
class Tile:
    """A figure with its name above and what belongs to it below."""

    name: str
    figure: str
    more: str


def tiles_of(content: PageContent) -> list[Tile]:
    """The tiles of a search, as far as it has come."""
    metric, certificate, winner = content.metric, content.certificate, content.winner
    found = []
    best = winner or next(iter(content.front), None)
    if best is not None:
        figure = f"{best.compression:.2f}× smaller"
        more = f"trial {best.trial}, {best.bytes:,} of {content.baseline['bytes']:,} bytes"
        found.append(Tile("Winner" if winner else "Smallest so far", figure, more))
        spread = 1.96 * metric.spread(best.increase_percent, best.stderr_percent)
        more = f"± {spread:.{2 + metric.digits}f} (95 %), {best.windows} search windows"
        found.append(Tile(f"Rise of {metric.rises}", metric.said(best.increase_percent, 2), more))
    if certificate is None:
        found.append(Tile("Certificate", "none yet", "the search makes it at its end"))
    else:
        more = f"{certificate.verdict}, {100 * certificate.confidence:g} %, {certificate.windows} unseen windows"
        found.append(Tile("At most", metric.said(certificate.upper_percent, 2), more))
    found.append(
        Tile(
            "Budget",
            f"+{metric.budget(content.budget_percent)}",
            f"over FP32, whose perplexity is {content.baseline['perplexity']:.4f}",
        )
    )
    stopped = sum(point.stopped is not None for point in content.points)
    early = f", {stopped} stopped early" if stopped else ""
    trials = f"{len(content.points):,} of {max(content.asked, len(content.points)):,}"
    found.append(Tile("Trials", trials, f"hypervolume {content.hypervolume:.{4 + metric.digits}f}{early}"))
    if content.gates:
        words = [gate.name for gate in content.gates if gate.verdict != "pass"]
        found.append(Tile("Gates", overall(content.gates), ", ".join(words) or f"all {len(content.gates)}"))
    return found
