"""What each int8 scheme and each way of choosing scales costs with every free component at int8.

    python -m benchmarks.schemes [--json]      # the reference study; about two minutes on 2 cores
    python -m benchmarks.schemes --prepare [--calibration 512] [--certify | --draws 3]

All rows are paired against the FP32 checkpoint on the same search windows, in one run. `--prepare`: the study's own
static int8 and weights alone at nf4 and int3, without and with prepared scales, and the difference between the two,
paired too. `--certify`: on the certify windows, which are more and on which no scale was chosen either. `--draws`:
static int8 with several disjoint draws of calibration windows, each on the same other windows of the calibration text,
since what scales gain depends on the windows that they are chosen on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter, convert
from ssm_mp.conversion.prepare import prepare, prepared_model
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from ssm_mp.scheme import ActivationScheme, ScaleMethod, ScaleRule, Scheme

FRESH = 384
"""Windows that several draws are judged on."""

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


def compared(
    workspace: Workspace, calibration: Windows, windows: Windows, activations: ActivationScheme, precision: str
) -> list[dict[str, Any]]:
    """Two rows, as the model is and prepared; the latter's cost over the former in percent."""
    model, lowest, own = workspace.model, workspace.space.lowest(), workspace.spec.precision.scheme
    scheme = Scheme(activations, own.weight_scales, own.input_scales)
    everywhere = lowest.changed({name: precision for name, lowered in lowest if lowered != "fp16"})
    found = prepare(model, calibration, ("fp16", precision), scheme)
    baseline = evaluate(model, windows)
    rows, first = [], None
    for prepared in (None, found):
        given = model if prepared is None else prepared_model(model, prepared)
        exponents = {} if prepared is None else prepared.inputs
        converter = Converter(given, scheme, calibrate(given, calibration, exponents=exponents))
        measured = evaluate(converter.convert(everywhere), windows)
        first = first or measured
        increase, over = paired_increase(measured, baseline), paired_increase(measured, first)
        rows.append(
            {
                "activations": activations, "precision": precision, "prepared": prepared is not None,
                "folded": 0 if prepared is None else prepared.changed, "inputs": len(exponents),
                "bytes": everywhere.bytes(converter.components, activations),
                "increase_percent": increase.percent, "stderr_percent": increase.stderr_percent,
                "over_unprepared_percent": over.percent, "over_stderr_percent": over.stderr_percent,
            }
        )  # fmt: skip
        print(*rows[-1].values(), file=sys.stderr)
    return rows


def opened(study: Path, calibration: int) -> Workspace:
    """The study with so many calibration windows."""
    spec = load_spec(study)
    data = spec.data.model_copy(update={"calibration_windows": calibration})
    return open_workspace(spec.model_copy(update={"data": data}))


def measure_prepared(study: Path, calibration: int, certify: bool) -> list[dict[str, Any]]:
    """Static int8 and weights alone at nf4 and int3, prepared on so many windows, on the study's windows."""
    workspace = opened(study, calibration)
    splits = workspace.splits
    windows = splits.certify if certify else splits.search
    kinds: list[tuple[ActivationScheme, str]] = [("static", "int8"), ("none", "nf4"), ("none", "int3")]
    return [row for kind in kinds for row in compared(workspace, splits.calibration, windows, *kind)]


def measure_draws(study: Path, calibration: int, draws: int) -> list[dict[str, Any]]:
    """Static int8 with each of some disjoint draws of calibration windows, all on others of the calibration text."""
    workspace = opened(study, draws * calibration + FRESH)
    ids = workspace.splits.calibration.ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    fresh = Windows(ids[draws * calibration :])
    each = ids[: draws * calibration].split(calibration)
    return [
        {"draw": i, **row}
        for i, drawn in enumerate(each)
        for row in compared(workspace, Windows(drawn), fresh, "static", "int8")
    ]


def print_prepared(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        name = f"{row['activations']:6} {row['precision']:4} {'scales' if row['prepared'] else 'none':6}"
        cost = f"{row['increase_percent']:+.3f} ± {1.96 * row['stderr_percent']:.3f} %"
        over = f"{row['over_unprepared_percent']:+.3f} ± {1.96 * row['over_stderr_percent']:.3f} %"
        name = f"draw {row['draw']} {name}" if "draw" in row else name
        print(f"{name} {cost}, over none {over}; {row['folded']} folded, {row['inputs']} inputs, {row['bytes']} bytes")


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--prepare", action="store_true")
    arguments.add_argument("--calibration", type=int, default=512, help="calibration windows of --prepare")
    arguments.add_argument("--certify", action="store_true")
    arguments.add_argument("--draws", type=int, default=0)
    arguments.add_argument("--study", type=Path, default=Path("studies/reference.toml"))
    given = arguments.parse_args()
    if given.draws:
        rows = measure_draws(given.study, given.calibration, given.draws)
    elif given.prepare:
        rows = measure_prepared(given.study, given.calibration, given.certify)
    else:
        rows = measure(given.study)
    if given.json:
        print(json.dumps({"schemes": rows}))
        return
    if given.prepare or given.draws:
        print_prepared(rows)
        return
    for row in rows:
        name = f"{row['activations']:8} weights {row['weight_scale']:11} inputs {row['input_scale'] or '-':11}"
        print(f"{name} {row['increase_percent']:+.3f} ± {1.96 * row['stderr_percent']:.3f} %")


if __name__ == "__main__":
    main()
