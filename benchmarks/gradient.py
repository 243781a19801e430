"""How well gradients alone rank components and precisions, beside probes, and what either costs.

    OMP_NUM_THREADS=1 python -m benchmarks.gradient [--study STUDY] [--json]      # about five minutes on one core

Correlations are between each probe from the widest map, measured on the search windows, and the gradient effect over
the widest precision's, estimated on the calibration windows: of all of it, and of its quadratic term alone. Pearson's
is of logarithms, where both are positive. Times are of one process. The costs of deeper models are not measured:
they are the measured costs of this model's embedding, layers and head put together for more layers of the same kind.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from search.measure.gradient import GradientEffect, gradient_effects, gradient_evaluations
from search.measure.probe import WIDEST, Probe, open_end, run_probes
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.evaluation.evaluate import advance, evaluate, finish, finish_against, start

DEPTHS = (4, 24, 48, 64)
_REPEATS = 3


@dataclass(frozen=True)
class StageSeconds:
    """Seconds for all search windows: embedding, one layer, one head, two heads with their divergence; the whole
    evaluation, the whole gradient pass."""

    embed: float
    layer: float
    head: float
    both_heads: float
    evaluation: float
    gradient: float


def correlations(probes: Iterable[Probe], effects: dict[str, dict[str, GradientEffect]]) -> list[dict[str, Any]]:
    """One row for each precision and one for all, for both estimates."""
    found = list(probes)
    precisions = list(dict.fromkeys(probe.precision for probe in found))
    rows = []
    for estimate in ("log_increase", "curvature"):
        for precision in (*precisions, "all"):
            chosen = [probe for probe in found if precision in (probe.precision, "all")]
            measured = np.array([probe.log_increase for probe in chosen])
            guessed = np.array([_over_widest(probe, effects, estimate) for probe in chosen])
            positive = (measured > 0) & (guessed > 0)
            logs = [np.log(values[positive]) for values in (measured, guessed)]
            rows.append(
                {
                    "estimate": estimate,
                    "precision": precision,
                    "pairs": len(chosen),
                    "spearman": float(spearmanr(measured, guessed).statistic),
                    "pearson_log": float(pearsonr(*logs).statistic) if positive.sum() > 2 else None,
                    "positive_pairs": int(positive.sum()),
                    "median_ratio": float(np.median(guessed[positive] / measured[positive])),
                    "sum_ratio": float(guessed.sum() / measured.sum()),
                }
            )
    return rows


def _over_widest(probe: Probe, effects: dict[str, dict[str, GradientEffect]], estimate: str) -> float:
    held = effects[probe.component]
    return float(getattr(held[probe.precision], estimate) - getattr(held[probe.origin], estimate))


def measure_stages(workspace: Workspace) -> tuple[StageSeconds, dict[str, dict[str, GradientEffect]]]:
    """Times of the FP32 model, the least of three except the gradient pass, which runs once."""
    model, windows = workspace.model, workspace.splits.search
    layers = len(model.layers)
    first = start(model, windows)
    final = advance(model, first, layers)
    began = time.perf_counter()
    effects = gradient_effects(workspace)
    gradient = time.perf_counter() - began
    return StageSeconds(
        embed=_least(lambda: start(model, windows)),
        layer=_least(lambda: advance(model, first, layers)) / layers,
        head=_least(lambda: finish(model, final, windows)),
        both_heads=_least(lambda: finish_against(model, final, model, final, windows)),
        evaluation=_least(lambda: evaluate(model, windows)),
        gradient=gradient,
    ), effects


def _least(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def costs(workspace: Workspace, stages: StageSeconds) -> list[dict[str, float]]:
    """For each depth, the costs of probes and gradients in evaluations of a model so deep.

    A probe at layer i of n runs n − i layers and both heads; the prefixes before them are run through
    once an end, and so is the end itself.
    """
    space = workspace.space
    layers = len(workspace.model.layers)
    outside = sum(len(space.choices[c.name]) - 1 for c in space.free if c.layer is None)
    inside = sum(len(space.choices[c.name]) - 1 for c in space.free if c.layer is not None) / layers  # a layer
    rows = []
    for n in DEPTHS:
        evaluation = stages.embed + n * stages.layer + stages.head
        full = evaluation - stages.head + stages.both_heads
        from_layers = inside * sum((n - i) * stages.layer + stages.both_heads for i in range(n))
        one_end = 2 * evaluation + outside * full + from_layers
        rows.append(
            {
                "layers": n,
                "probes_one_end": outside + inside * n,
                "both_ends": 2 * one_end / evaluation,
                "one_end": one_end / evaluation,
                "gradient_counted": gradient_evaluations(workspace),
                "gradient_as_timed_here": stages.gradient / stages.evaluation,
            }
        )
    return rows


def measure(study: Path) -> dict[str, Any]:
    """Everything, in one process."""
    workspace = open_workspace(load_spec(study))
    stages, effects = measure_stages(workspace)
    began = time.perf_counter()
    probes = run_probes(workspace, [open_end(workspace, WIDEST)], [], lambda probe: None)
    probing = time.perf_counter() - began
    return {
        "seconds": asdict(stages) | {"probes_one_end": probing},
        "gradient_evaluations_timed": stages.gradient / stages.evaluation,
        "probe_evaluations_timed": probing / stages.evaluation,
        "correlations": correlations(probes, effects),
        "costs": costs(workspace, stages),
        "effects": {name: {p: asdict(e) for p, e in held.items()} for name, held in effects.items()},
        "probes": [probe.stored() for probe in probes],
    }


def main() -> None:
    """Measure and print tables, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--study", type=Path, default=Path("studies/reference-cumulative.toml"))
    given = arguments.parse_args()
    found = measure(given.study)
    if given.json:
        print(json.dumps(found))
        return
    for key in ("gradient", "probe"):
        print(f"{key}: {found[f'{key}_evaluations_timed']:.2f} evaluations by the clock")
    print("estimate      precision  pairs  Spearman  Pearson of logs (positive pairs)  ratio: median  of sums")
    for row in found["correlations"]:
        pearson = "-" if row["pearson_log"] is None else f"{row['pearson_log']:.3f}"
        print(
            f"{row['estimate']:13} {row['precision']:10} {row['pairs']:5}  {row['spearman']:8.3f}"
            f"  {pearson:>15} ({row['positive_pairs']:3})  {row['median_ratio']:25.2f}  {row['sum_ratio']:7.2f}"
        )
    print("evaluations:  layers  probes, both ends  one end  gradient, counted  as timed here")
    for row in found["costs"]:
        print(
            f"{row['layers']:20}  {row['both_ends']:17.0f}  {row['one_end']:7.0f}"
            f"  {row['gradient_counted']:17.2f}  {row['gradient_as_timed_here']:13.2f}"
        )


if __name__ == "__main__":
    main()
