"""What it gains or loses to let many components move together: fronts after 64 trials, grouped and not.

    OMP_NUM_THREADS=1 python -m benchmarks.grouping [--seeds 3] [--json]        # on a truth that adds up, with pairs
    python -m benchmarks.grouping --measure STUDY.toml                          # measures the effects of that truth
    python -m benchmarks.grouping --study STUDY.toml --trials 16 --run-dir DIR  # really searches, each grouping

Two truths. "widened" has the effects of a widened reference (`benchmarks.widen`; stored are those of 24 layers of 256,
as many components as at 94 million parameters), from gradients on windows that the search's own gradient probe does not
see, each off by a lognormal factor besides, for what Taylor's formula leaves out. "synthetic" has 200 components of 40
layers and an embedding, whose sensitivities spread over kinds, layers and components alike. Both have pair terms:
normal, in proportion to the roots of both effects. A search knows the gradient probe's effects, or only sizes; it
begins as a real one does, with both ends and a predicted front, and goes on with the sampler `front`. The hypervolume
is a fraction of that of the additive programme that knows the true effects (without pairs); bytes are those of the
smallest map within the budget, above that programme's.

Dimensions: `n` components, `k` precisions, `u` units that move, `w` windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from search.base.front import hypervolume, pareto_front
from search.measure.gradient import gradient_effects, gradient_windows
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from search.run.one_process import run_search
from search.sampling.catalogue import Catalogue
from search.sampling.clusters import clusters, sensitivities
from search.sampling.gain import area, staircase
from search.sampling.knowledge import before_any_trial
from search.sampling.sampler import Asked, make_sampler, proposer
from search.sampling.surrogate import Surrogate, additive_front, predicted_front
from ssm_mp.components import fp32_bytes
from ssm_mp.data import Windows
from ssm_mp.precisions.registry import get_precision

WIDENED = Path("benchmarks/oracles/widened.npz")
GROUPINGS = ("none", "layer", "kind", "auto")
AUTO_SIZES = (8, 16, 32)
BUDGET, TRIALS, SEEDS = 5.0, 64, 12
_PAIRS, _OFF = 0.1, 0.3
"""Spreads of pair terms, beside the roots of both effects, and of the logarithm by which each true effect is off."""
_KINDS, _LAYERS = 5, 40


@dataclass(frozen=True, eq=False)
class World:
    """Components, and what is known of them: sizes in bytes, true effects and the probe's over the widest, `[n, k]`.

    layers: −1 for what belongs to none.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    precisions: tuple[str, ...]
    sizes: np.ndarray
    effects: np.ndarray
    probed: np.ndarray
    fixed: int
    fp32_bytes: int

    def units(self, grouping: str) -> list[list[int]]:
        """Which components move together; for `auto` with at most so many units, `auto 16`."""
        if grouping == "none":
            return [[c] for c in range(len(self.names))]
        if grouping.startswith("auto"):
            saved = (self.sizes[:, 0] - self.sizes[:, -1]).astype(float)
            apart = [name if layer < 0 else "" for name, layer in zip(self.names, self.layers, strict=True)]
            return clusters(sensitivities(self.probed[:, -1], saved), saved, apart, int(grouping.split()[1]))
        named = self.layers if grouping == "layer" else self.kinds
        found: dict[object, list[int]] = {}
        for c, layer in enumerate(self.layers):
            found.setdefault(self.names[c] if layer < 0 else named[c], []).append(c)
        return list(found.values())

    def catalogue(self, units: Sequence[Sequence[int]]) -> Catalogue:
        """The space as numbers."""
        sizes = tuple(tuple(int(size) for size in self.sizes[unit].sum(axis=0)) for unit in map(list, units))
        names = tuple(f"unit {u}" for u in range(len(units)))
        return Catalogue(names, (self.precisions,) * len(units), sizes, self.fixed, self.fp32_bytes)

    def by_size(self) -> np.ndarray:
        """Effects as expected where nothing is probed: by size and rounding, with the sum that the lowest map has."""
        rounding = np.array([4.0 ** -get_precision(name).bits for name in self.precisions])
        raw = self.sizes[:, :1] * (rounding - rounding[0])
        return np.asarray(raw * self.effects[:, -1].sum() / raw[:, -1].sum())


class Truth:
    """What evaluating a map finds, log-increase; pair terms are drawn from a seed of the world, not of the search."""

    def __init__(self, world: World, seed: int = 0) -> None:
        n, k = world.effects.shape
        roots = np.sqrt(np.maximum(world.effects, 0)).ravel()
        drawn = np.triu(np.random.default_rng(seed).normal(0, _PAIRS, (n * k, n * k)), 1)
        self._pairs = drawn * roots[:, None] * roots
        self._effects, self._index = world.effects, np.arange(n) * k

    def __call__(self, chosen: np.ndarray) -> float:
        """Of one map as choices of components `[n]`."""
        held = self._index + chosen
        return float(self._effects.ravel()[held].sum() + self._pairs[np.ix_(held, held)].sum())


def synthetic(seed: int = 0) -> World:
    """200 components and an embedding; int3 everywhere costs about 15 %."""
    rng = np.random.default_rng(seed)
    of_kind, of_layer = rng.lognormal(0, 1.0, _KINDS), rng.lognormal(0, 0.7, _LAYERS)
    count = np.array([40e6, *np.tile([2.4e6, 6e3, 1.2e5, 8e4, 1.2e6], _LAYERS)])
    layers = (-1, *(int(layer) for layer in np.repeat(np.arange(_LAYERS), _KINDS)))
    kinds = ("embedding", *(f"kind {i % _KINDS}" for i in range(_KINDS * _LAYERS)))
    ratio = np.append(1.0, (of_layer[:, None] * of_kind).ravel()) * rng.lognormal(0, 0.7, len(count))
    precisions = ("fp16", "int8", "nf4", "int3")
    cost = np.array([0.0, 1 / 256, 1.0, 5.0])
    total = (count * ratio)[:, None] * cost * rng.lognormal(0, 0.2, (len(count), 4))
    effects = 0.14 * total / total[:, -1].sum()
    probed = effects * np.exp(rng.normal(0, _OFF, effects.shape))
    sizes = np.round(count[:, None] * np.array([16, 8, 4.25, 3.25]) / 8).astype(np.int64)
    names = tuple(f"component {c}" for c in range(len(count)))
    return World(names, kinds, layers, precisions, sizes, effects, probed, 0, int(4 * count.sum()))


def measure(study: Path, windows: int) -> None:
    """Gradient effects of a study on two sets of windows, and the sizes of its space, as a small file."""
    workspace = open_workspace(load_spec(study), lambda line: print(line, file=sys.stderr))
    space, scheme = workspace.space, workspace.spec.precision.activations
    precisions = space.choices[space.free[0].name]
    free = [component for component in space.free if space.choices[component.name] == precisions]
    ids = gradient_windows(workspace).ids[: 2 * windows]
    halves = []
    for number, part in enumerate((ids[::2], ids[1::2])):
        effects = gradient_effects(workspace, lambda: print(".", end="", file=sys.stderr, flush=True), Windows(part))
        found = np.array([[effects[c.name][p].log_increase for p in precisions] for c in free])
        halves.append(found - found[:, :1])
        print(f" half {number} of the windows", file=sys.stderr)
    sizes = np.array([[component.bytes(p, scheme) for p in precisions] for component in free])
    said = {
        "names": [component.name for component in free], "kinds": [component.kind for component in free],
        "layers": [-1 if component.layer is None else component.layer for component in free],
        "precisions": precisions, "fp32_bytes": fp32_bytes(space.components), "windows": len(ids) // 2,
        "fixed": space.widest().bytes(space.components, scheme) - int(sizes[:, 0].sum()),
    }  # fmt: skip
    np.savez_compressed(WIDENED, said=json.dumps(said), sizes=sizes, probed=halves[0], others=halves[1])


def widened(seed: int = 0) -> World:
    """The world of the stored effects: the truth has other windows than the probe, and is off it besides."""
    with np.load(WIDENED) as file:
        said = json.loads(str(file["said"]))
        off = np.exp(np.random.default_rng(seed).normal(0, _OFF, file["others"].shape[0]))[:, None]
        effects = np.maximum(file["others"], 0) * off
        return World(
            tuple(said["names"]), tuple(said["kinds"]), tuple(said["layers"]), tuple(said["precisions"]), file["sizes"],
            effects, file["probed"], said["fixed"], said["fp32_bytes"],
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One search: fraction of the programme's hypervolume, bytes above its smallest map in percent, seconds a trial."""

    units: int
    fraction: float
    excess_percent: float
    seconds: float


def searched(world: World, truth: Truth, grouping: str, probe: str, seed: int) -> Found:
    """A search of `TRIALS` trials: both ends, the front that the surrogate predicts, then the sampler."""
    began = time.perf_counter()
    units = world.units(grouping)
    catalogue = world.catalogue(units)
    single = world.probed if probe == "gradient" else world.by_size()
    effects = {
        name: dict(zip(world.precisions, map(float, single[unit].sum(axis=0)), strict=True))
        for name, unit in zip(catalogue.names, units, strict=True)
    }
    maps, increases = [np.zeros(len(units), dtype=int), np.full(len(units), len(world.precisions) - 1)], list[float]()

    def evaluate(chosen: np.ndarray) -> float:
        whole = np.zeros(len(world.names), dtype=int)
        for unit, choice in zip(units, chosen, strict=True):
            whole[unit] = choice
        increases.append(100 * float(np.expm1(truth(whole))))
        return increases[-1]

    space = {n: CategoricalDistribution(p) for n, p in zip(catalogue.names, catalogue.precisions, strict=True)}
    study = optuna.create_study(
        directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE],
        sampler=make_sampler("front", Asked(space, seed, before_any_trial(catalogue, effects), BUDGET)),
    )
    surrogate = Surrogate(0.0, effects, 0.0)
    maps += [catalogue.encode(m) for m in predicted_front(surrogate, catalogue, SEEDS, float(np.log1p(BUDGET / 100)))]
    queue = list(maps)
    maps = []
    while len(maps) < TRIALS:
        proposal = None if queue else proposer(study).propose(study)
        if not queue and proposal is None:
            break  # every map is tried
        maps.append(queue.pop(0) if proposal is None else catalogue.encode(proposal.params))
        compression = catalogue.fp32_bytes / float(catalogue.bytes(maps[-1][None])[0])
        values = [compression, evaluate(maps[-1])]
        trial = create_trial(
            state=TrialState.COMPLETE, params=catalogue.decode(maps[-1]), values=values, distributions=dict(space)
        )
        study.add_trial(trial)
    sizes, percent = catalogue.bytes(np.array(maps)), np.array(increases)
    volume, smallest = programme(world, truth)
    reached = area(staircase(world.fp32_bytes / sizes, percent, BUDGET), BUDGET)
    best = sizes[percent <= BUDGET].min() if (percent <= BUDGET).any() else sizes.max()
    spent = (time.perf_counter() - began) / TRIALS
    return Found(len(units), reached / volume, 100 * (float(best) / smallest - 1), spent)


def programme(world: World, truth: Truth) -> tuple[float, int]:
    """Hypervolume and smallest bytes within the budget of all maps that are best by the true effects without pairs."""
    catalogue = world.catalogue(world.units("none"))
    effects = {
        name: dict(zip(world.precisions, map(float, row), strict=True))
        for name, row in zip(catalogue.names, world.effects, strict=True)
    }
    front = additive_front(Surrogate(0.0, effects, 0.0), catalogue)
    within = front.choices[front.cost <= 2 * np.log1p(BUDGET / 100)]
    percent = 100 * np.expm1([truth(chosen) for chosen in within])
    sizes = catalogue.bytes(within)
    volume = area(staircase(world.fp32_bytes / sizes, percent, BUDGET), BUDGET)
    return volume, int(sizes[percent <= BUDGET].min())


def compare(seeds: int, probes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each world, probe and grouping: medians over seeds, and the worst."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    makers = {"synthetic": synthetic, **({"widened": widened} if WIDENED.exists() else {})}
    for name, make in makers.items():
        for probe in probes:
            autos = [f"auto {most}" for most in AUTO_SIZES] if probe == "gradient" else []
            for grouping in ("none", "layer", "kind", *autos):
                found = []
                for seed in range(seeds):
                    world = make(seed)
                    found.append(searched(world, Truth(world, seed), grouping, probe, seed))
                row = {
                    "world": name, "probe": probe, "group": grouping, "units": found[0].units,
                    "hypervolume": statistics.median(one.fraction for one in found),
                    "hypervolume_worst": min(one.fraction for one in found),
                    "excess_percent": statistics.median(one.excess_percent for one in found),
                    "excess_percent_worst": max(one.excess_percent for one in found),
                    "seconds_a_trial": statistics.median(one.seconds for one in found),
                }  # fmt: skip
                print(_line(row), file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def search_all(study: Path, trials: int, folder: Path, most: int) -> list[dict[str, Any]]:
    """Really search with each grouping; a run directory that is there is continued."""
    rows = []
    for grouping in GROUPINGS:
        asked = ["search.probe=gradient", f"search.trials={trials}", f"precision.group={grouping}"]
        asked += [f"precision.max_groups={most}"] if grouping == "auto" else []
        spec, began = load_spec(study, asked), time.perf_counter()
        result = run_search(spec, RunDirectory(folder / grouping), lambda line: print(line, file=sys.stderr))
        front = pareto_front(result.points, spec.search.budget_percent)
        rows.append(
            {
                "group": grouping,
                "trials": len(result.points),
                "hypervolume": hypervolume(result.points, spec.search.budget_percent),
                "bytes": front[0].bytes if front else None,
                "increase_percent": front[0].increase_percent if front else None,
                "winner": None if result.winner is None else result.winner.bytes,
                "seconds": time.perf_counter() - began,
            }
        )
    return rows


def _line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
    return "  ".join(f"{cell:>10}" for cell in cells)


def main() -> None:
    """Measure and print a table, or one JSON list."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--probe", choices=("gradient", "none"), action="append", help="default: both")
    arguments.add_argument("--measure", type=Path, metavar="STUDY", help="measure the effects of the truth, and end")
    arguments.add_argument("--windows", type=int, default=8, help="of each half, for --measure")
    arguments.add_argument("--study", type=Path, help="really search it, with each grouping")
    arguments.add_argument("--trials", type=int, default=16, help="of each real search")
    arguments.add_argument("--max-groups", type=int, default=16, help="of each real search")
    arguments.add_argument("--run-dir", type=Path, default=Path("runs/grouping"), help="of the real searches")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    if given.measure is not None:
        measure(given.measure, given.windows)
        return
    if given.study is not None:
        rows = search_all(given.study, given.trials, given.run_dir, given.max_groups)
    else:
        rows = compare(given.seeds, given.probe or ("gradient", "none"))
    if given.json:
        print(json.dumps(rows))
        return
    print("\n".join([_line(dict.fromkeys(rows[0], "") | {key: key for key in rows[0]}), *map(_line, rows)]))


if __name__ == "__main__":
    main()
