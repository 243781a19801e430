"""What rounding below 8 bits costs, to nearest and compensated, book by book, and what each part of it brings.

    python -m benchmarks.rounding [--study studies/hybrid.toml] [--only nf3 int3] [--json]

Perplexity increase ± 95 % over FP32 on the same search windows, in one run: weights only, what is not rounded at fp16.
"Everything" is all free components, compensated where they multiply inputs or look tokens up. The rows below the
books: nf3 with the damping fixed, and with errors fed back once but codes and scales not improved afterwards; 8 and 4
levels as QLoRA builds them, quantiles with a zero (Dettmers et al. 2023, appendix E).

About five minutes of one core a study.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.problem.spec import StudySpec, load_spec
from search.problem.workspace import open_workspace
from ssm_mp.components import Component, find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.moments import Gathered
from ssm_mp.conversion.rounding import damping_of, gathered_moments, weight_of
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import Evaluation, evaluate, paired_increase
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PINNED_TO, PrecisionMap
from ssm_mp.precisions import grouped as g
from ssm_mp.precisions.compensate import DAMPINGS, ROUNDS, compensated
from ssm_mp.precisions.grouped import Grouped, GroupedTensor
from ssm_mp.precisions.groups import CodeBook
from ssm_mp.precisions.stored import Stored
from ssm_mp.scheme import ScaleRule, Scheme

BOOKS = {one.name: one for one in (g.NF4, g.INT4, g.NF3, g.INT3, g.NF2, g.NF4G32, g.NF4G128, g.NF3G32, g.NF3G128)}
TRIED_ON = "nf3"
_EIGHT = (-1.0, -0.5350227, -0.2469314, 0.0, 0.1833375, 0.3819939, 0.6229857, 1.0)
QLORA = (
    Grouped("8 levels as QLoRA builds them", CodeBook(3, _EIGHT, either_sign=True)),
    Grouped("4 levels as QLoRA builds them", CodeBook(2, (-1.0, 0.0, 0.4358182, 1.0), either_sign=True)),
)
COLUMNS = ("projections, nearest", "compensated", "embedding, nearest", "compensated", "everything")
_HELD_AS = "nf3"
"""What a map calls a weight that is given ready made, whatever its book."""


@dataclass(frozen=True, eq=False)
class Row:
    """A book and how its rounding is compensated; damping None: chosen as a study chooses it."""

    name: str
    precision: Grouped
    damping: float | None = None
    rounds: int = ROUNDS
    is_tried: bool = False
    """Whether it is a part left out, whose rounding to nearest stands in another row."""


Cell = tuple[float, float]
"""Perplexity increase over FP32 and half of its 95 % interval, in percent."""


@dataclass(frozen=True)
class Measured:
    """A row's cells, in the order of the columns, and the seconds that rounding took."""

    name: str
    cells: tuple[Cell | None, ...]
    nearest_seconds: float
    compensated_seconds: float


def rows_of(only: Sequence[str] = ()) -> list[Row]:
    """All rows, or those of some books."""
    rows = [Row(name, BOOKS[name]) for name in BOOKS]
    tried = BOOKS[TRIED_ON]
    rows += [Row(f"{TRIED_ON}, damping {d:g}", tried, damping=d, is_tried=True) for d in DAMPINGS]
    rows.append(Row(f"{TRIED_ON}, not improved", tried, rounds=0, is_tried=True))
    rows += [Row(book.name, book) for book in QLORA]
    return [row for row in rows if not only or row.precision.name in only]


@dataclass(frozen=True, eq=False)
class Bench:
    """An FP32 model, its moments, and how it does on the windows that all maps are measured on."""

    model: LanguageModel
    windows: Windows
    free: tuple[Component, ...]
    moments: Mapping[str, Gathered]
    baseline: Evaluation

    @classmethod
    def of(cls, model: LanguageModel, free: tuple[Component, ...], calibration: Windows, windows: Windows) -> Bench:
        """All moments are held at once: 8·k² bytes of each component with k inputs, and of each of its experts."""
        moments = dict(gathered_moments(model, calibration, free, _say))
        return cls(model, windows, free, moments, evaluate(model, windows))

    def measure(self, row: Row) -> Measured:
        """Round every free component both ways, and evaluate the columns."""
        began = time.monotonic()
        nearest, halfway = self.nearest(row), time.monotonic()
        better, ended = self.compensated(row), time.monotonic()
        embedding = {component.name for component in self.free if component.kind == "embedding"}
        projections = self.moments.keys() - embedding
        columns = (nearest, projections), (better, projections), (nearest, embedding), (better, embedding)
        cells = [
            None if row.is_tried and ways is nearest else self._cell({name: ways[name] for name in names})
            for ways, names in columns
        ]
        cells.append(self._cell(nearest | better))
        return Measured(row.name, tuple(cells), halfway - began, ended - halfway)

    def nearest(self, row: Row) -> dict[str, Stored]:
        """The weights of all free components."""
        store, rule = row.precision.store, ScaleRule("mse")
        return {c.name: store(weight_of(self.model, c.name), "weight", rule) for c in self.free}

    def compensated(self, row: Row) -> dict[str, Stored]:
        """The weights of those that have moments."""
        book, group = row.precision.book, row.precision.group
        found: dict[str, Stored] = {}
        for name, gathered in self.moments.items():
            weight = weight_of(self.model, name)
            damping = damping_of(weight, gathered) if row.damping is None else row.damping
            packed, scales = compensated(weight, gathered.all, book, group, damping, row.rounds)
            found[name] = GroupedTensor(packed, scales, tuple(weight.shape), book)
        return found

    def converted(self, weights: Mapping[str, Stored]) -> LanguageModel:
        """The model with some weights in place of its own, all else at fp16."""
        names = [component.name for component in find_components(self.model)]
        rounded = {(name, _HELD_AS): stored for name, stored in weights.items()}
        chosen = PrecisionMap(tuple((name, _HELD_AS if name in weights else PINNED_TO) for name in names))
        return Converter(self.model, Scheme("none"), rounded=rounded).convert(chosen)

    def _cell(self, weights: Mapping[str, Stored]) -> Cell:
        increase = paired_increase(evaluate(self.converted(weights), self.windows), self.baseline)
        return increase.percent, 1.96 * increase.stderr_percent


def weights_only(spec: StudySpec, search: int, calibration: int) -> StudySpec:
    """A study with so many windows, without activations, which rounds nothing below 8 bits itself."""
    data = spec.data.model_copy(update={"search_windows": search, "calibration_windows": calibration})
    precision = spec.precision.model_copy(update={"choices": ("fp16", "int8"), "activations": "none"})
    return spec.model_copy(update={"data": data, "precision": precision})


def measure(spec: StudySpec, rows: Sequence[Row], told: Callable[[Measured], None]) -> dict[str, Any]:
    """The table of a study, each row told once it is there."""
    workspace = open_workspace(spec, _say)
    began = time.monotonic()
    bench = Bench.of(workspace.model, workspace.space.free, workspace.splits.calibration, workspace.splits.search)
    seconds = time.monotonic() - began
    measured = []
    for row in rows:
        measured.append(bench.measure(row))
        told(measured[-1])
    return {
        "study": spec.path.stem,
        "search_windows": len(bench.windows),
        "calibration_windows": len(workspace.splits.calibration),
        "moments_and_baseline_seconds": seconds,
        "rows": [asdict(one) for one in measured],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def line(one: Measured) -> str:
    """A row for people."""
    cells = "".join(f"{'' if c is None else f'{c[0]:+.2f} ± {c[1]:.2f}':>22}" for c in one.cells)
    return f"{one.name:30}{cells}{one.nearest_seconds:>14.2f}{one.compensated_seconds:>8.1f}"


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--study", type=Path, default=Path("studies/reference.toml"))
    arguments.add_argument("--windows", type=int, default=256, help="search windows")
    arguments.add_argument("--calibration", type=int, default=512, help="calibration windows")
    arguments.add_argument("--only", nargs="+", default=(), choices=[*BOOKS, *(book.name for book in QLORA)])
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    spec = weights_only(load_spec(given.study), given.windows, given.calibration)
    rows = rows_of(given.only)
    if given.json:
        print(json.dumps(measure(spec, rows, lambda one: _say(line(one)))))
        return
    head = "".join(f"{text:>22}" for text in (*COLUMNS, "s, nearest and comp."))
    print(f"{f'increase %, {spec.path.stem}':30}{head}", flush=True)
    found = measure(spec, rows, lambda one: print(line(one), flush=True))
    print(f"moments and baseline, once: {found['moments_and_baseline_seconds']:.1f} s")


if __name__ == "__main__":
    main()
