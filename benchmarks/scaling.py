"""What a trial and the probes cost, against layers, width, components and windows, from the reference to 130 million.

    python -m benchmarks.scaling [--json] [--only NAME …]      # about five minutes on two cores

A trial converts and evaluates a map whose free components are half int8, half fp16; each component was quantised once
before, as in a study. Probes are measured at the embedding and at the first, the middle and the last layer, the second
of each group, so that what its group shares (the states before it) is made already; `probes` are all of a study, from
both ends, by the formula

    2 · (evaluation + Σ over layers i of components · ((n − i) · layer + both heads) + the embedding's own),

from the stages measured apart; `formula_error` is its largest relative miss of the probes that were measured. The fit
says all trials by three rates: seconds = tokens · (a · multiplications + b · values of scan states + c · logits).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.shapes import LENGTH, NAMES, checkpoint_of, workspace_of
from search.measure.probe import LOWEST, End, Group, open_end, planned, run_group
from search.problem.workspace import Workspace
from ssm_mp.components import find_components
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import advance, evaluate, finish, finish_against, start
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.precision_map import PrecisionMap

WINDOWS = {"reference": 128, "8 layers of 256": 64, "16 layers of 512": 32, "130m": 16}
"""Search windows of each size; trials are measured on half of them as well."""
_REPEATS = 3


@dataclass(frozen=True)
class Stages:
    """Seconds of the parts of an evaluation of all windows; `both_heads`: likelihoods and divergence of two heads."""

    embed: float
    layer: float
    head: float
    both_heads: float


@dataclass(frozen=True)
class Trial:
    """Seconds of one trial on so many windows."""

    windows: int
    seconds: float


def half_int8(workspace: Workspace) -> PrecisionMap:
    """Every second free component int8, the others fp16."""
    free = workspace.space.free
    return workspace.space.map({c.name: workspace.space.choices[c.name][i % 2] for i, c in enumerate(free)})


def measure_trials(workspace: Workspace) -> list[Trial]:
    """A trial on all windows and on half of them."""
    precision_map = half_int8(workspace)
    whole = workspace.splits.search
    found = []
    for windows in (Windows(whole.ids[: len(whole) // 2]), whole):

        def trial(windows: Windows = windows) -> object:
            return evaluate(workspace.converter.convert(precision_map), windows)

        found.append(Trial(len(windows), _median(trial)))
    return found


def measure_stages(workspace: Workspace, end: End) -> Stages:
    """The parts of one evaluation, of the all-int8 model, whose last states `end` holds."""
    model, windows, layers = end.model, workspace.splits.search, workspace.checkpoint.config.n_layers
    first = start(model, windows)
    return Stages(
        embed=_median(lambda: start(model, windows)),
        layer=_median(lambda: advance(model, first, layers)) / layers,
        head=_median(lambda: finish(model, end.final, windows)),
        both_heads=_median(lambda: finish_against(model, end.final, model, end.final, windows)),
    )


def measure_probes(workspace: Workspace, end: End) -> dict[int, float]:
    """Seconds of one probe by stage: the embedding (0), the first, the middle and the last layer."""
    layers = workspace.checkpoint.config.n_layers
    found = {}
    for stage in sorted({0, 1, layers // 2 + 1, layers}):
        probes = run_group(workspace, end, Group(end.name, stage), [], lambda: None)
        seconds = [_seconds(lambda: next(probes)) for _ in range(1 if stage == 0 else 3)]  # noqa: B023, run at once
        found[stage] = statistics.median(seconds[1:] or seconds)
    return found


def probe_seconds(stages: Stages, layers: int, stage: int) -> float:
    """What one probe at a stage should take."""
    after = layers if stage == 0 else layers - stage + 1
    return (stages.embed if stage == 0 else 0.0) + after * stages.layer + stages.both_heads


def all_probes_seconds(workspace: Workspace, stages: Stages) -> float:
    """What all probes of a study should take, both ends and the states that groups share included."""
    layers, space = len(workspace.checkpoint.config.branches), workspace.space
    ends = stages.embed + layers * stages.layer + stages.head
    prefixes = sum(stages.embed + (stage - 1) * stages.layer for stage in range(1, layers + 1))
    each = [
        probe_seconds(stages, layers, component.stage) * (len(space.choices[component.name]) - 1)
        for component in space.free
    ]
    return 2 * (ends + prefixes + sum(each))


def measure(name: str) -> dict[str, Any]:
    """One size: everything, in this process."""
    checkpoint = checkpoint_of(name)
    config = checkpoint.config
    assert isinstance(config, MambaConfig)
    began = time.perf_counter()
    workspace = workspace_of(checkpoint, WINDOWS[name])
    prepared = time.perf_counter() - began
    trials = measure_trials(workspace)
    low = open_end(workspace, LOWEST)
    stages = measure_stages(workspace, low)
    probes = measure_probes(workspace, low)
    errors = [abs(probe_seconds(stages, config.n_layers, stage) / seconds - 1) for stage, seconds in probes.items()]
    tokens = WINDOWS[name] * LENGTH
    return {
        "name": name,
        "layers": config.n_layers,
        "width": config.d_model,
        "vocabulary": config.vocabulary,
        "parameters": sum(component.count for component in find_components(checkpoint)),
        "free_components": len(workspace.space.free),
        "windows": WINDOWS[name],
        "prepare_seconds": prepared,
        "trials": [asdict(trial) for trial in trials],
        "trial_seconds": trials[-1].seconds,
        "trial_us_per_token": 1e6 * trials[-1].seconds / tokens,
        "stages": asdict(stages),
        "probe_seconds": {str(stage): seconds for stage, seconds in probes.items()},
        "formula_error": max(errors),
        "probes": planned(workspace),
        "all_probes_seconds": all_probes_seconds(workspace, stages),
        "all_probes_in_trials": all_probes_seconds(workspace, stages) / trials[-1].seconds,
        "work": work(config),
    }


def work(config: MambaConfig) -> dict[str, int]:
    """Of one token: multiplications in products, values of scan states, logits."""
    products = [p for p in config.parameters() if p.role == "weight" and p.kind.endswith("_proj")]
    inside = sum(p.shape[0] * p.shape[1] for p in products)
    return {
        "multiplications": inside + config.vocabulary * config.d_model,
        "scan_values": config.n_layers * config.d_inner * config.d_state,
        "logits": config.vocabulary,
    }


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The three rates that say all trials best, in relative error, and how far off they are at the worst."""
    kinds = ("multiplications", "scan_values", "logits")
    trials = [(row, trial) for row in rows for trial in row["trials"]]
    # each equation divided by its seconds, so that a small model counts as much as a large one
    matrix = np.array([[row["work"][k] * t["windows"] * LENGTH / t["seconds"] for k in kinds] for row, t in trials])
    rates, _ = nnls(matrix, np.ones(len(trials)))
    return {
        "nanoseconds": {kind: 1e9 * float(rate) for kind, rate in zip(kinds, rates, strict=True)},
        "largest_error": float(np.abs(matrix @ rates - 1).max()),
    }


def _median(run: Callable[[], object]) -> float:
    return statistics.median(_seconds(run) for _ in range(_REPEATS))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _print(found: dict[str, Any]) -> None:
    print(f"{found['threads']} threads, {found['cpu_capability']}; windows of {LENGTH} tokens")
    print("size                layers  width  vocabulary  parameters  components  windows  trial s  µs/token  probes")
    for row in found["sizes"]:
        print(
            f"{row['name']:18} {row['layers']:7} {row['width']:6} {row['vocabulary']:11} {row['parameters']:11,}"
            f" {row['free_components']:11} {row['windows']:8} {row['trial_seconds']:8.3f}"
            f" {row['trial_us_per_token']:9.1f} {row['probes']:7}"
        )
    print("size                seconds of one probe, by stage; all of them, in seconds and in trials; formula's error")
    for row in found["sizes"]:
        each = "  ".join(f"{stage}: {seconds:.3f}" for stage, seconds in row["probe_seconds"].items())
        print(
            f"{row['name']:18}  {each};  {row['all_probes_seconds']:.1f} s, {row['all_probes_in_trials']:.0f} trials; "
            f"{100 * row['formula_error']:.0f} %"
        )
    for row in found["sizes"]:
        half, whole = (trial["seconds"] for trial in row["trials"])
        print(f"{row['name']:18}  a trial on twice the windows takes {whole / half:.2f} times as long")
    if "fit" in found:
        rates = ", ".join(f"{rate:.4f} ns a {kind}" for kind, rate in found["fit"]["nanoseconds"].items())
        print(f"fit: {rates}; off by at most {100 * found['fit']['largest_error']:.0f} %")


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    given = arguments.parse_args()
    rows = []
    for name in given.only:
        print(f"measuring {name}", file=sys.stderr)
        rows.append(measure(name))
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    found: dict[str, Any] = {"threads": threads, "cpu_capability": capability, "sizes": rows}
    if len(rows) > 1:
        found["fit"] = fit(rows)
    if given.json:
        print(json.dumps(found))
        return
    _print(found)


if __name__ == "__main__":
    main()
