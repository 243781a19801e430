"""What each int8 scheme and each way of choosing scales costs with every free component at int8.

    python -m benchmarks.schemes [--json]      # the reference study; about two minutes on 2 cores
    python -m benchmarks.schemes --prepare [--certify]

All rows are paired against the FP32 checkpoint on the same search windows, in one run. `--prepare`: the study's own
static int8 and weights alone at nf4 and int3, without and with prepared scales, and the difference between the two,
paired too. `--certify`: on the certify windows, which are more and on which no scale was chosen either.
What is gained depends on the calibration windows: with others of the same text, scales have cost more than nothing.
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
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.conversion.prepare import prepare, prepared_model
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


def measure_prepared(study: Path, certify: bool) -> list[dict[str, Any]]:
    """Two rows a scheme and precision, as it is and prepared; the latter's cost over the former in percent."""
    spec = load_spec(study)
    workspace = open_workspace(spec)
    model, splits, lowest = workspace.model, workspace.splits, workspace.space.lowest()
    windows = splits.certify if certify else splits.search
    baseline, own = evaluate(model, windows), spec.precision.scheme
    free = [name for name, precision in lowest if precision != "fp16"]
    rows = []
    for activations, precision in (("static", "int8"), ("none", "nf4"), ("none", "int3")):
        scheme = Scheme(activations, own.weight_scales, own.input_scales)  # type: ignore[arg-type]
        everywhere = lowest.changed(dict.fromkeys(free, precision))
        found = prepare(model, splits.calibration, ("fp16", precision), scheme)
        measured = []
        for prepared in (None, found):
            given = model if prepared is None else prepared_model(model, prepared)
            exponents = {} if prepared is None else prepared.inputs
            statistics = calibrate(given, splits.calibration, exponents=exponents)
            converter = Converter(given, scheme, statistics)
            measured.append(evaluate(converter.convert(everywhere), windows))
            increase = paired_increase(measured[-1], baseline)
            over = paired_increase(measured[-1], measured[0])
            rows.append(
                {
                    "activations": activations, "precision": precision, "prepared": prepared is not None,
                    "folded": 0 if prepared is None else prepared.changed, "inputs": len(exponents),
                    "bytes": everywhere.bytes(converter.components, activations),  # type: ignore[arg-type]
                    "increase_percent": increase.percent, "stderr_percent": increase.stderr_percent,
                    "over_unprepared_percent": over.percent, "over_stderr_percent": over.stderr_percent,
                }
            )  # fmt: skip
            print(*rows[-1].values(), file=sys.stderr)
    return rows


def print_prepared(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        name = f"{row['activations']:6} {row['precision']:4} {'scales' if row['prepared'] else 'none':6}"
        cost = f"{row['increase_percent']:+.3f} ± {1.96 * row['stderr_percent']:.3f} %"
        over = f"{row['over_unprepared_percent']:+.3f} ± {1.96 * row['over_stderr_percent']:.3f} %"
        print(f"{name} {cost}, over none {over}; {row['folded']} folded, {row['inputs']} inputs, {row['bytes']} bytes")


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--prepare", action="store_true")
    arguments.add_argument("--certify", action="store_true")
    arguments.add_argument("--study", type=Path, default=Path("studies/reference.toml"))
    given = arguments.parse_args()
    rows = measure_prepared(given.study, given.certify) if given.prepare else measure(given.study)
    if given.json:
        print(json.dumps({"schemes": rows}))
        return
    if given.prepare:
        print_prepared(rows)
        return
    for row in rows:
        name = f"{row['activations']:8} weights {row['weight_scale']:11} inputs {row['input_scale'] or '-':11}"
        print(f"{name} {row['increase_percent']:+.3f} ± {1.96 * row['stderr_percent']:.3f} %")


if __name__ == "__main__":
    main()
