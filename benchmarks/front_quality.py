"""How near to the exact front each way of choosing maps comes in how many evaluations.

    OMP_NUM_THREADS=1 python -m benchmarks.front_quality [--json] [--workers 2] [--plot benchmarks/front_quality.png]

Most of its time goes to the Gaussian process. The truth are three oracles, subspaces of which
every map was evaluated (`oracle.py`): "two" (12 components of the reference model, int8 and int3), "three" (8 of them,
int8, nf4, int3), on which the sampler's prior was chosen, and "hybrid" (12 components of the second reference, int8 and
int3), which was made afterwards. Figures are
fractions of the exact front's hypervolume (corner: no compression, the budget of 5 %) after 16, 32, 64 and 128
evaluations, probes counted, over ten seeds; and how many bytes the smallest map found within the budget is larger
than the smallest there is. Peers are added where the extra `bench` is installed and a finished run is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.contenders import BUDGET, MOST, STOPS_AFTER, catalogue_of, contenders, increase_percent
from benchmarks.oracle import SUBSPACES, Oracle, load_oracle
from benchmarks.peers import compare
from search.problem.run_directory import FINGERPRINT
from search.sampling.gain import area, staircase

BUDGETS = (16, 32, 64, 128)
SEEDS = 10


@dataclass(frozen=True, eq=False)
class Curve:
    """One run: fraction of the exact hypervolume after each evaluation `[MOST]`, and excess bytes of the winner.

    An excess of −1 stands for no map within the budget.
    """

    fraction: np.ndarray
    excess: np.ndarray


def exact(oracle: Oracle) -> tuple[float, int]:
    """Hypervolume of the exact front, and bytes of the smallest map within the budget."""
    sizes, percent = oracle.all_bytes().ravel(), 100 * np.expm1(oracle.log_increase.ravel())
    return area(staircase(oracle.fp32_bytes / sizes, percent, BUDGET), BUDGET), int(sizes[percent <= BUDGET].min())


def run_one(name: str, contender: str, seed: int, cache: Path) -> Curve:
    """One contender with one seed; what `cache` holds is not run again."""
    kept = cache / f"{name}-{contender.replace(', ', '-').replace(' ', '-')}-{seed}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return Curve(file["fraction"], file["excess"])
    curve = _run(name, contender, seed)
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(kept, fraction=curve.fraction, excess=curve.excess)
    return curve


def _run(name: str, contender: str, seed: int) -> Curve:
    oracle = load_oracle(name)
    whole, smallest = exact(oracle)
    spent, order = contenders(name, oracle)[contender](seed)
    maps = list(itertools.islice(order, STOPS_AFTER.get(contender, MOST) - spent))
    percent = np.array([increase_percent(oracle, chosen) for chosen in maps])
    sizes = catalogue_of(oracle).bytes(np.array(maps))
    fraction, excess = np.zeros(MOST), np.full(MOST, -1)
    for n in range(spent, MOST):
        seen, held = sizes[: n + 1 - spent], percent[: n + 1 - spent]
        fraction[n] = area(staircase(oracle.fp32_bytes / seen, held, BUDGET), BUDGET) / whole
        if (held <= BUDGET).any():
            excess[n] = seen[held <= BUDGET].min() - smallest
    return Curve(fraction, excess)


def run_all(name: str, workers: int, cache: Path, only: Sequence[str] = ()) -> dict[str, list[Curve]]:
    """All contenders, or only some, with all seeds."""
    names = [contender for contender in contenders(name, load_oracle(name)) if not only or contender in only]
    jobs = [(name, contender, seed, cache) for contender in names for seed in range(SEEDS)]
    found: dict[str, list[Curve]] = {contender: [] for contender in names}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (_, contender, _, _), curve in zip(jobs, pool.map(run_one, *zip(*jobs, strict=True)), strict=True):
            found[contender].append(curve)
            if len(found[contender]) == SEEDS:
                print(f"{name}: {contender} done", file=sys.stderr, flush=True)
    return found


def summarise(curves: Sequence[Curve]) -> dict[str, dict[str, float]]:
    """Evaluations → median and worst fraction over the seeds."""
    return {
        str(n): {
            "median": float(np.median([curve.fraction[n - 1] for curve in curves])),
            "worst": float(min(curve.fraction[n - 1] for curve in curves)),
        }
        for n in BUDGETS
    }


def regret(curves: Sequence[Curve]) -> dict[str, dict[str, float | None]]:
    """Evaluations → median and worst excess bytes of the winner; None where some seed has no map within the budget."""
    found: dict[str, dict[str, float | None]] = {}
    for n in BUDGETS:
        held = [float(curve.excess[n - 1]) for curve in curves]
        none = min(held) < 0
        found[str(n)] = {"median": None if none else float(np.median(held)), "worst": None if none else max(held)}
    return found


def plot(results: dict[str, dict[str, list[Curve]]]) -> Figure:
    """What each contender still misses of the exact hypervolume, median and band over the seeds."""
    figure = Figure(figsize=(11.5, 5.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, found) in zip(panels, results.items(), strict=True):
        for i, (contender, curves) in enumerate(found.items()):
            missing = np.maximum(1 - np.stack([curve.fraction for curve in curves]), 1e-5)
            ours = contender.startswith("front")
            colour = ("#0072B2", "#56B4E9", "#009E73")[i] if ours else f"C{i}"
            style: Any = {
                "color": colour,
                "linewidth": 2.4 if ours else 1.1,
                "linestyle": "--" if ", " in contender else "-",
            }
            x = np.arange(1, MOST + 1)
            axes.plot(x, np.median(missing, axis=0), label=contender, **style)
            axes.fill_between(x, missing.min(axis=0), missing.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(8e-6, 1.1)
        axes.set_xlabel("evaluations, probes counted")
        space = SUBSPACES[name]
        title = f"{name}: {len(space.components)} components, {' / '.join(space.precisions)}"
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(color="#E6E6E6")
    panels[0].set_ylabel("missing of the exact hypervolume (median, band: all seeds)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--oracle", choices=sorted(SUBSPACES), action="append", help="default: all")
    arguments.add_argument("--only", nargs="+", default=(), metavar="CONTENDER", help="default: all of them")
    arguments.add_argument("--plot", type=Path, help="where to draw the curves (.png)")
    arguments.add_argument("--cache", type=Path, help="folder that keeps finished runs; default: none")
    arguments.add_argument("--study", type=Path, default=Path("studies/reference-cumulative.toml"), help="for peers")
    arguments.add_argument("--run-dir", type=Path, default=Path("runs/reference-cumulative"), help="for peers")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = given.cache or Path(folder)
        results = {
            name: run_all(name, given.workers, cache, given.only) for name in given.oracle or ("two", "three", "hybrid")
        }
    if given.plot is not None:
        plot(results).savefig(given.plot, dpi=130)
    tables = {name: {who: summarise(curves) for who, curves in found.items()} for name, found in results.items()}
    regrets = {name: {who: regret(curves) for who, curves in found.items()} for name, found in results.items()}
    first = next(iter(tables))
    if given.json:
        installed = any(find_spec(package) for package in ("modelopt", "aimet_torch"))
        finished = given.run_dir if (given.run_dir / FINGERPRINT).exists() else None
        peers = compare(given.study, finished) if installed else {}
        answer = {"oracle": tables[first], "oracles": tables, "regret_bytes": regrets, "stops_after": STOPS_AFTER}
        print(json.dumps({**answer, "peers": peers}))
        return
    for name, table in tables.items():
        print(f"\n{name}: fraction of the exact hypervolume, median (worst) of {SEEDS} seeds; worst regret at {MOST}")
        for who, row in table.items():
            cells = "  ".join(f"{row[str(n)]['median']:.4f} ({row[str(n)]['worst']:.4f})" for n in BUDGETS)
            worst = regrets[name][who][str(MOST)]["worst"]
            print(f"{who:28} {cells}  {'none' if worst is None else f'{worst:,.0f} B'}")


if __name__ == "__main__":
    main()
