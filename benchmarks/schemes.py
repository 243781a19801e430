"""What each int8 scheme and each way of choosing scales costs with every free component at int8.

    python -m benchmarks.schemes [--json]      # the reference study; about two minutes on 2 cores

All rows are paired against the FP32 checkpoint on the same search windows, in one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from ssm_mp.scheme import ScaleMethod, ScaleRule, Scheme

METHODS: tuple[ScaleMethod, ...] = ("minmax", "percentile", "mse")


def schemes() -> list[Scheme]:
    """Weight-only and dynamic with each weight rule, static with each pair of rules."""
    found = [Scheme("none", ScaleRule(method)) for method in METHODS]
    found += [Scheme("dynamic", ScaleRule(method)) for method in METHODS]
    return found + [Scheme("static", ScaleRule(w), ScaleRule(x)) for w in ("minmax", "mse") for x in METHODS]


def measure(study: Path) -> list[dict[str, Any]]:
    """One row a scheme: perplexity increase and its standard error, in percent."""
    workspace = open_workspace(load_spec(study))
    windows, lowest = workspace.splits.search, workspace.space.lowest()
    baseline = evaluate(workspace.model, windows)
    statistics = calibrate(workspace.model, workspace.splits.calibration)
    rows = []
    for scheme in schemes():
        converted = convert(workspace.model, lowest, scheme, statistics)
        increase = paired_increase(evaluate(converted, windows), baseline)
        rows.append(
            {
                "activations": scheme.activations,
                "weight_scale": scheme.weight_scales.method,
                "input_scale": scheme.input_scales.method if scheme.activations == "static" else None,
                "increase_percent": increase.percent,
                "stderr_percent": increase.stderr_percent,
            }
        )
        print(*rows[-1].values(), file=sys.stderr)
    return rows


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--study", type=Path, default=Path("studies/reference.toml"))
    given = arguments.parse_args()
    rows = measure(given.study)
    if given.json:
        print(json.dumps({"schemes": rows}))
        return
    for row in rows:
        name = f"{row['activations']:8} weights {row['weight_scale']:11} inputs {row['input_scale'] or '-':11}"
        print(f"{name} {row['increase_percent']:+.3f} ± {1.96 * row['stderr_percent']:.3f} %")


if __name__ == "__main__":
    main()
