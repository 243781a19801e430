"""How often a certified winner breaks the budget: synthetic searches whose truth is known.

    python -m benchmarks.certificate [--searches 2000] [--json]      # about eight minutes on one core

Every synthetic search has true, additive effects, search windows that choose the front (so its increases are too
good, as those of chosen maps are), and independent certify windows. The project's own `pareto_front`, `held_of`,
`plans` and `certify` decide, at five looks: half of the trials; the same once more;
all trials; twice the certify windows, the former ones among them; as many trials again. One ledger goes through all
looks, and a search counts as broken where *any* look certified a map whose true increase is above the budget.

What is promised is that at most 5 % of all *searches* certify such a map. Of those that certify, more may be wrong
where hardly any map is within the budget: where none is ("just above"), all that are certified are.

Scenarios with documents draw all windows of a split from documents of very different sizes, whose windows resemble
each other; another split has documents of its own. Each is shown with bounds over documents, as the project certifies
where it knows enough, and again with bounds over windows, which break what they promise there. Scenarios "per map" test
each map for a share of its own, the smallest first, as version 0.5 did: the price of one rule beside the other.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.looks import (
    BUDGET,
    HEADINGS,
    Look,
    Outcome,
    Rule,
    Summary,
    certifying,
    judge_study,
    points_of,
    row_of,
    summarise,
)
from benchmarks.synthetic import Noise, Windows, edge_world, model_world, propose, smallest_within, total
from search.base.certifiable import Certifying
from search.base.front import Point
from search.results.certify import Held, held_of

REFERENCE = Noise()
"""That of the reference checkpoint, see `benchmarks/synthetic.py`."""


@dataclass(frozen=True)
class Scenario:
    """A kind of search. `world`: "model" has components at four precisions, searched around the budget; "edge" has
    unrelated maps whose true increase is off the budget by `margin` (relative). `trials` are those of the third look.
    `by_documents`: whether the certificate is told which document a window comes from.
    """

    name: str
    world: Literal["model", "edge"]
    certify_windows: int
    noise: Noise = REFERENCE
    search_windows: int = 128
    trials: int = 64
    margin: tuple[float, float] = (0.0, 0.01)
    rule: Rule = "sequence"
    by_documents: bool = False


_DOCUMENTS: tuple[tuple[str, Literal["model", "edge"], Noise], ...] = (
    ("reference, 40 documents, alike 0", "model", Noise(documents=40)),
    ("reference, 40 documents, alike 0.03", "model", Noise(documents=40, alike=0.03)),
    ("reference, 40 documents, alike 0.15", "model", Noise(documents=40, alike=0.15)),
    ("just above, 40 documents, alike 0.03", "edge", Noise(documents=40, alike=0.03)),
    ("just above, 40 documents, alike 0.15", "edge", Noise(documents=40, alike=0.15)),
    ("just above, 100 documents, alike 0.15", "edge", Noise(documents=100, alike=0.15)),
)

SCENARIOS = (
    *(Scenario(f"reference, {n} windows", "model", n) for n in (64, 128, 512)),
    Scenario("quiet, 128 windows", "model", 128, Noise(sd=0.01)),
    Scenario("loud, 128 windows", "model", 128, Noise(sd=0.12)),
    Scenario("skewness 4, 64 windows", "model", 64, Noise(skewness=4)),
    Scenario("both sides, 64 windows", "edge", 64, margin=(-0.2, 0.2)),
    Scenario("both sides, 512 windows", "edge", 512, margin=(-0.1, 0.1)),
    Scenario("just above, 2 maps, 128 windows", "edge", 128, trials=2),
    *(Scenario(f"just above, {n} windows", "edge", n) for n in (64, 128, 512)),
    *(Scenario(f"just above, skewness 2, {n} windows", "edge", n, Noise(skewness=2)) for n in (64, 128, 512)),
    *(Scenario(f"just above, skewness 4, {n} windows", "edge", n, Noise(skewness=4)) for n in (64, 128, 512)),
    *(Scenario(f"just above, heavy tails, {n} windows", "edge", n, Noise(tails=0.8)) for n in (64, 512)),
    Scenario("reference, 512 windows, per map", "model", 512, rule="per map"),
    *(
        Scenario(f"{name}, by {'documents' if told else 'windows'}", world, 512, noise, by_documents=told)
        for name, world, noise in _DOCUMENTS
        for told in (True, False)
    ),
)


def scenario(name: str) -> Scenario:
    """One of `SCENARIOS`."""
    return next(known for known in SCENARIOS if known.name == name)


def search_once(kind: Scenario, rng: np.random.Generator) -> Outcome:
    """One synthetic search with all its looks."""
    if kind.world == "edge":
        world = edge_world(BUDGET, kind.margin, 2 * kind.trials, rng)
        maps, smallest = np.eye(2 * kind.trials, dtype=np.int64), None
        search_split = Windows(world, kind.noise, kind.search_windows, rng)
        measured = search_split.means()
    else:
        world = model_world(BUDGET, rng)
        search_split = Windows(world, kind.noise, kind.search_windows, rng)
        measured = search_split.means()
        maps = np.zeros((0, measured.shape[0]), dtype=np.int64)
        for _ in range(2):
            maps = np.concatenate([maps, propose(world, measured, maps, kind.trials, rng)])
        smallest = int(world.bytes(smallest_within(world, world.effects)[None])[0])
    certify_split = Windows(world, kind.noise, 2 * kind.certify_windows, rng)

    sources = certify_split.sources if kind.by_documents else None

    def measure(point: Point, windows: int) -> Held:
        known = None if sources is None else sources[:windows]
        return held_of(certify_split.differences(maps[point.trial], windows), known)

    def asked(windows: int) -> Certifying:
        if sources is None:
            return certifying(windows)
        return certifying(windows, search_split.sources, sources[:windows], kind.noise.alike)

    rises = total(measured, maps)
    spread = kind.noise.sd * np.sqrt(np.maximum(rises, 0) / BUDGET / kind.search_windows)
    points = points_of(world.bytes(maps), rises, spread, kind.search_windows)
    return judge_study(points, world.increases(maps), measure, looks_of(kind), smallest, kind.rule, asked)


def looks_of(kind: Scenario) -> list[Look]:
    """Half of the trials, the same again, all trials, twice the windows, twice the trials."""
    trials, windows = kind.trials, kind.certify_windows
    first = Look(trials // 2, windows)
    return [first, first, Look(trials, windows), Look(trials, 2 * windows), Look(2 * trials, 2 * windows)]


def simulate(kind: Scenario, searches: int, seed: int = 0) -> Summary:
    """Many independent searches of one scenario; the same figures for the same seed."""
    children = np.random.SeedSequence(seed).spawn(searches)
    return summarise([search_once(kind, np.random.default_rng(child)) for child in children])


def main() -> None:
    """Simulate every scenario and print a table in percent, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--searches", type=int, default=2000, help="synthetic searches of each scenario")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="", help="scenarios whose name contains this")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    if not given.json:
        print(f"{'scenario':54} {HEADINGS}")
    for kind in SCENARIOS:
        if given.only in kind.name:
            found = simulate(kind, given.searches, given.seed)
            rows.append({"scenario": asdict(kind), **asdict(found)})
            if not given.json:
                print(f"{kind.name:54} {row_of(found)}", flush=True)
    if given.json:
        print(json.dumps({"scenarios": rows}))


if __name__ == "__main__":
    main()
