"""What rounding below 8 bits costs, to nearest and compensated, book by book, and what each part of it brings.

    python -m benchmarks.rounding [--study studies/hybrid.toml] [--only nf3,int3] [--json]

Perplexity increase ± 95 % over FP32 on the same search windows, in one run: weights only, what is not rounded at fp16.
"Everything" is all free components, compensated where they multiply inputs or look tokens up. The rows below the
books: nf3 with the damping fixed, and with errors fed back once but codes and scales not improved afterwards; 8 and 4
levels as QLoRA builds them, quantiles with a zero (Dettmers et al. 2023, appendix E). MINUTES
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

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
from ssm_mp.precisions.compensate import DAMPINGS, ROUNDS, compensated
from ssm_mp.precisions.grouped import Grouped, GroupedTensor
from ssm_mp.precisions.groups import CodeBook
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import Stored
from ssm_mp.scheme import ScaleRule, Scheme

BOOKS = ("nf4", "int4", "nf3", "int3", "nf2", "nf4g32", "nf4g128", "nf3g32", "nf3g128")
TRIED_ON = "nf3"
QLORA = (
    Grouped(
        "8 levels as QLoRA builds them",
        CodeBook(3, (-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819939, 0.6229857, 1), either_sign=True),
    ),
    Grouped("4 levels as QLoRA builds them", CodeBook(2, (-1, 0, 0.4358182, 1), either_sign=True)),
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


@dataclass(frozen=True)
class Cell:
    """Perplexity increase over FP32 and half of its 95 % interval, in percent."""

    percent: float
    margin: float


@dataclass(frozen=True)
class Measured:
    """A row's cells, in the order of the columns, and the seconds that rounding all components took."""

    name: str
    cells: tuple[Cell | None, ...]
    nearest_seconds: float
    compensated_seconds: float


def rows_of(only: Sequence[str] = ()) -> list[Row]:
    """All rows, or those of some books."""
    rows = [Row(name, _grouped(name)) for name in BOOKS]
    tried = _grouped(TRIED_ON)
    rows += [Row(f"{TRIED_ON}, damping {d:g}", tried, damping=d, is_tried=True) for d in DAMPINGS]
    rows.append(Row(f"{TRIED_ON}, not improved", tried, rounds=0, is_tried=True))
    rows += [Row(book.name, book) for book in QLORA]
    return [row for row in rows if not only or row.precision.name in only]


def _grouped(name: str) -> Grouped:
    found = get_precision(name)
    assert isinstance(found, Grouped)
    return found


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
        nearest = {c.name: _nearest(weight_of(self.model, c.name), row) for c in self.free}
        halfway = time.monotonic()
        better = {name: _compensated(weight_of(self.model, name), row, one) for name, one in self.moments.items()}
        ended = time.monotonic()
        embedding = {component.name for component in self.free if component.kind == "embedding"}
        projections = self.moments.keys() - embedding
        columns = (
            None if row.is_tried else _some(nearest, projections),
            _some(better, projections),
            None if row.is_tried else _some(nearest, embedding),
            _some(better, embedding),
            nearest | better,
        )
        cells = tuple(None if column is None else self._cell(column) for column in columns)
        return Measured(row.name, cells, halfway - began, ended - halfway)

    def _cell(self, weights: Mapping[str, Stored]) -> Cell:
        """The model with some weights in place of its own, all else at fp16."""
        names = [component.name for component in find_components(self.model)]
        rounded = {(name, _HELD_AS): stored for name, stored in weights.items()}
        chosen = PrecisionMap(tuple((name, _HELD_AS if name in weights else PINNED_TO) for name in names))
        converted = Converter(self.model, Scheme("none"), rounded=rounded).convert(chosen)
        increase = paired_increase(evaluate(converted, self.windows), self.baseline)
        return Cell(increase.percent, 1.96 * increase.stderr_percent)


def _some(weights: Mapping[str, Stored], names: Iterable[str]) -> dict[str, Stored]:
    return {name: weights[name] for name in names}


def _nearest(weight: Tensor, row: Row) -> Stored:
    return row.precision.store(weight, "weight", ScaleRule("mse"))


def _compensated(weight: Tensor, row: Row, gathered: Gathered) -> Stored:
    precision = row.precision
    damping = damping_of(weight, precision, gathered) if row.damping is None else row.damping
    found = compensated(weight, gathered.all, precision.book, precision.group, damping, row.rounds)
    return GroupedTensor(*found, tuple(weight.shape), precision.book)


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_HEAD = "".join(f"{text:>20}" for text in (*COLUMNS, "s, nearest and comp."))


def _line(one: Measured) -> str:
    cells = "".join(f"{'' if c is None else f'{c.percent:+.2f} ± {c.margin:.2f}':>20}" for c in one.cells)
    return f"{one.name:30}{cells}{one.nearest_seconds:>14.2f}{one.compensated_seconds:>8.1f}"


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--study", type=Path, default=Path("studies/reference.toml"))
    arguments.add_argument("--windows", type=int, default=256, help="search windows")
    arguments.add_argument("--calibration", type=int, default=512, help="calibration windows")
    arguments.add_argument("--only", default="", help="books, with a comma between")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    spec = weights_only(load_spec(given.study), given.windows, given.calibration)
    rows = rows_of([name for name in given.only.split(",") if name])
    if given.json:
        print(json.dumps(measure(spec, rows, lambda one: _say(_line(one)))))
        return
    print(f"{f'perplexity increase, %, {spec.path.stem}':30}{_HEAD}", flush=True)
    found = measure(spec, rows, lambda one: print(_line(one), flush=True))
    print(f"moments and baseline, once: {found['moments_and_baseline_seconds']:.1f} s")


if __name__ == "__main__":
    main()
