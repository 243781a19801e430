"""A finished search of a tiny model, whose names try to be more than text, and a large one that nobody ran."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from search.base.front import Point
from search.measure.probe import WIDEST, Probe
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.results import export
from search.results.page.content import PageContent
from search.run.one_process import run_search
from search.run.stored import content_now
from search.trials.storage import read_study
from tests.tiny import write_study

NAME = "it's <script>window.hacked = 1<script> & {trial}"
"""Of a study file: quotes, a tag, an entity, and what our own commands are made with."""
EVIL = '</script><script>window.hacked = 1</script><img src="x:y" onerror="window.hacked = 1">"\'\u2028'
_SETTINGS = (
    "search.trials=9",
    "search.seeds=2",
    'precision.choices=["fp16", "int8", "nf4"]',
    "precision.unpin=['norm']",
)


@dataclass(frozen=True)
class Searched:
    """A study and its run directory."""

    spec: StudySpec
    run: RunDirectory

    def content(self) -> PageContent:
        """Its page."""
        return content_now(self.spec, self.run, read_study(self.run))


def search_in(folder: Path) -> Searched:
    """Run a whole search."""
    study = write_study(folder).rename(folder / f"{NAME}.toml")
    found = Searched(load_spec(study, [*_SETTINGS, "search.budget_percent=60"]), RunDirectory(folder / "a run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_LEAST_TIMING", 0.2)  # nothing here looks at speeds
        run_search(found.spec, found.run, lambda line: None)
    return found


def large(content: PageContent, trials: int, components: int) -> PageContent:
    """The page of a search with so many trials of maps of so many components, drawn at random."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "name": f"layers.{i // 8}.part{i % 8}", "kind": f"part{i % 8}", "layer": i // 8, "parameters": 1000,
            "fp32_bytes": 4000, "pinned": False, "bytes": {"fp16": 2000, "int8": 1010, "nf4": 530},
        }
        for i in range(components)
    ]  # fmt: skip
    points = []
    for trial in range(trials):
        held = rng.choice(["fp16", "int8", "nf4"], components, p=rng.dirichlet([1, 1, 1]))
        size = sum(row["bytes"][precision] for row, precision in zip(rows, held, strict=True))  # type: ignore[index]
        rise = 40 * (1 - size / (2000 * components)) ** 2 * rng.lognormal(0, 0.5)
        named = {str(row["name"]): str(precision) for row, precision in zip(rows, held, strict=True)}
        compression = 4000 * components / size
        points.append(Point(trial, compression, size, 20 + rise / 5, rise, 0.1, named, "front", 128))
    probes = [
        Probe(str(row["name"]), precision, WIDEST, "fp16", cost, 1e-4, 0.0)
        for row in rows
        for precision, cost in (("int8", rng.exponential(1e-3)), ("nf4", rng.exponential(1e-2)))
    ]
    baseline = {"perplexity": 20.0, "bytes": 4000 * components}
    growth = [(1 + i, 0.1 * i) for i in range(trials)]
    return replace(
        content, points=points, components=rows, probes=probes, baseline=baseline, growth=growth, certificate=None,
        budget_percent=60.0, asked=trials, gates=[],
    )  # fmt: skip
