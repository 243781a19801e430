"""What splitting the token embedding by token frequency buys.

    OMP_NUM_THREADS=1 python -m benchmarks.embedding_blocks [--json]      # two minutes on one core
    python -m benchmarks.embedding_blocks --split RUN --whole RUN         # two finished searches beside each other

The first form lowers the embedding alone, all else fp16, paired against FP32 on the search windows. The second
compares the fronts of the same study with `embedding_blocks` and with `--set 'precision.embedding_blocks=[]'`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from search.base.front import Point, hypervolume, pareto_front
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from search.trials.read_back import points
from search.trials.storage import read_study
from ssm_mp.evaluation.evaluate import evaluate, paired_increase

STUDY = Path("studies/reference-cumulative.toml")
ALLOCATIONS = (
    ("int8", "int8", "int8", "int8"),
    ("int8", "int8", "int8", "nf4"),
    ("int8", "int8", "nf4", "nf4"),
    ("int8", "nf4", "nf4", "nf4"),
    ("nf4", "nf4", "nf4", "nf4"),
    ("int8", "nf4", "nf4", "int3"),
    ("nf4", "nf4", "nf4", "int3"),
    ("int8", "nf4", "int3", "int3"),
    ("nf4", "nf4", "int3", "int3"),
    ("int3", "int3", "int3", "int3"),
)
"""Precisions of the blocks, the most frequent tokens first; where all are alike, a whole table could be the same."""
LEVELS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
"""Increases in percent at which the fronts' smallest maps are compared."""


def allocations(study: Path) -> list[dict[str, Any]]:
    """One row an allocation: bytes of the embedding, perplexity increase and standard error in percent."""
    workspace = open_workspace(load_spec(study))
    space, windows = workspace.space, workspace.splits.search
    baseline = evaluate(workspace.model, windows)
    blocks = [component for component in space.components if component.kind == "embedding"]
    rows = []
    for held in ALLOCATIONS:
        chosen = {block.name: precision for block, precision in zip(blocks, held, strict=True)}
        increase = paired_increase(evaluate(workspace.converter.convert(space.map(chosen)), windows), baseline)
        stored = sum(block.bytes(chosen[block.name], workspace.spec.precision.activations) for block in blocks)
        rows.append(
            {
                "blocks": held, "bytes": stored, "increase_percent": increase.percent,
                "stderr_percent": increase.stderr_percent,
            }
        )  # fmt: skip
    return rows


def finished(run: Path) -> list[Point]:
    """All trials of a finished search."""
    directory = RunDirectory(run)
    return points(read_study(directory), directory.space())


def fronts(split: Path, whole: Path, budget: float) -> dict[str, Any]:
    """Hypervolume of both fronts, and bytes of each one's smallest map within each level."""
    found: dict[str, Any] = {}
    for name, run in (("split", split), ("whole", whole)):
        tried = finished(run)
        smallest = {level: pareto_front(tried, level)[:1] for level in LEVELS}
        found[name] = {
            "trials": len(tried),
            "hypervolume": hypervolume(tried, budget),
            "bytes": {str(level): front[0].bytes if front else None for level, front in smallest.items()},
        }
    return found


def main() -> None:
    """Measure or compare, and print a table or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--study", type=Path, default=STUDY)
    arguments.add_argument("--split", type=Path, help="run directory of a search with blocks")
    arguments.add_argument("--whole", type=Path, help="run directory of the same search without")
    given = arguments.parse_args()
    if given.split and given.whole:
        compared = fronts(given.split, given.whole, load_spec(given.study).search.budget_percent)
        if given.json:
            print(json.dumps(compared))
            return
        for name, row in compared.items():
            sizes = "  ".join(f"{level} %: {size or 0:,}" for level, size in row["bytes"].items())
            print(f"{name:6} {row['trials']} trials, hypervolume {row['hypervolume']:.3f}; bytes within {sizes}")
        return
    rows = allocations(given.study)
    if given.json:
        print(json.dumps({"allocations": rows}))
        return
    for row in rows:
        error = 1.96 * row["stderr_percent"]
        blocks = " ".join(f"{precision:5}" for precision in row["blocks"])
        print(f"{blocks} {row['bytes']:9,} B  {row['increase_percent']:+.2f} ± {error:.2f} %")


if __name__ == "__main__":
    main()
