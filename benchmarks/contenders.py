"""The ways to choose maps that `front_quality` compares, each as an order in which an oracle's maps are evaluated.

Dimensions: `n` components, `t` evaluations.

Every way may look at a map's increase only once it has evaluated it; what it measures to learn sensitivities counts.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection

from benchmarks.oracle import GRADIENT_WINDOWS, SUBSPACES, Oracle
from search.sampling.catalogue import Catalogue
from search.sampling.gain import area, staircase
from search.sampling.knowledge import Knowledge, before_any_trial
from search.sampling.programme import frontier
from search.sampling.proposal import costs
from search.sampling.sampler import Asked, make_sampler
from ssm_mp.precisions.registry import get_precision

BUDGET = 5.0
MOST = 128
STOPS_AFTER = {"gp": 64, "gp, seeded": 64}
"""Optuna's Gaussian process takes half a minute for 64 evaluations and minutes for 128: it is stopped there."""
Map = tuple[int, ...]


def catalogue_of(oracle: Oracle) -> Catalogue:
    """An oracle's space as numbers."""
    sizes = tuple(tuple(int(size) for size in row) for row in oracle.sizes)
    precisions = (oracle.precisions,) * len(oracle.components)
    return Catalogue(oracle.components, precisions, sizes, oracle.fixed, oracle.fp32_bytes)


def increase_percent(oracle: Oracle, chosen: Map) -> float:
    """What evaluating a map finds."""
    return float(100 * np.expm1(oracle.log_increase[chosen]))


def gradient_cost(name: str) -> int:
    """Evaluations that the gradient probe costs: as long as 14 forward passes a window (`benchmarks/gradient.py`)."""
    return -(-14 * GRADIENT_WINDOWS // SUBSPACES[name].windows)


def _probes(oracle: Oracle, ends: tuple[str, ...]) -> Iterator[Map]:
    """The maps that probes from one or both ends evaluate, each end first."""
    n, k = len(oracle.components), len(oracle.precisions)
    for end in ends:
        base = (0 if end == "widest" else k - 1,) * n
        yield base
        for c, p in itertools.product(range(n), range(k)):
            if p != base[c]:
                yield (*base[:c], p, *base[c + 1 :])


def _effects(oracle: Oracle, ends: tuple[str, ...]) -> np.ndarray:
    """Effect of each (component, choice) over the widest, the mean of what the ends say: `[n, k]`."""
    n, k = oracle.sizes.shape
    found = []
    for end in ends:
        base = (0 if end == "widest" else k - 1,) * n
        rows = [[oracle.log_increase[(*base[:c], p, *base[c + 1 :])] for p in range(k)] for c in range(n)]
        found.append(np.array(rows) - np.array(rows)[:, :1])
    return np.asarray(np.mean(found, axis=0))


def integer_programme(oracle: Oracle, ends: tuple[str, ...]) -> Iterator[Map]:
    """Probes, then the exact front of their sum, those maps first that promise the most area."""
    yield from _probes(oracle, ends)
    catalogue, effects = catalogue_of(oracle), _effects(oracle, ends)
    flat = np.array([effects[c, k] for c, k in catalogue.features])
    offset = float(oracle.log_increase[(0,) * len(oracle.components)])
    front = frontier(catalogue.sizes, costs(catalogue, flat), np.log1p(BUDGET / 100) - offset)
    compression = catalogue.fp32_bytes / catalogue.bytes(front.choices)
    percent = 100 * np.expm1(front.cost + offset)
    chosen: list[int] = []
    for _ in range(len(percent)):
        rest = [i for i in range(len(percent)) if i not in chosen]
        gains = [area(staircase(compression[[*chosen, i]], percent[[*chosen, i]], BUDGET), BUDGET) for i in rest]
        chosen.append(rest[int(np.argmax(gains))])
        yield tuple(int(k) for k in front.choices[chosen[-1]])


def greedy(oracle: Oracle, by: str) -> Iterator[Map]:
    """Lower one component after another, the least sensitive (probed from the widest end) or the largest first."""
    n, k = oracle.sizes.shape
    steps = [(c, p) for c in range(n) for p in range(1, k)]
    if by == "sensitivity":
        yield from _probes(oracle, ("widest",))
        effects = _effects(oracle, ("widest",))
        steps.sort(key=lambda step: effects[step])
    else:
        steps.sort(key=lambda step: -(oracle.sizes[step[0], step[1] - 1] - oracle.sizes[step]))
    held = [0] * n
    yield tuple(held)
    for c, p in steps:
        if p > held[c]:
            held[c] = p
            yield tuple(held)


def sampled(oracle: Oracle, sampler: str, seed: int, seeds: tuple[Map, ...], knowledge: Knowledge) -> Iterator[Map]:
    """An Optuna study with one of the samplers of a study file; `seeds` are queued first."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    catalogue = catalogue_of(oracle)
    pairs = zip(catalogue.names, catalogue.precisions, strict=True)
    space = {name: CategoricalDistribution(precisions) for name, precisions in pairs}
    asked: dict[str, BaseDistribution] = dict(space)
    study = optuna.create_study(
        directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE],
        sampler=make_sampler(sampler, Asked(space, seed, knowledge, BUDGET)),
    )
    for chosen in seeds:
        study.enqueue_trial(catalogue.decode(chosen))
    while True:
        trial = study.ask(fixed_distributions=asked)
        chosen = tuple(int(k) for k in catalogue.encode(trial.params))
        found = increase_percent(oracle, chosen)
        trial.set_constraint("budget", found - BUDGET)
        study.tell(trial, [oracle.fp32_bytes / oracle.bytes(chosen), found])
        yield chosen


def contenders(name: str, oracle: Oracle) -> dict[str, Callable[[int], tuple[int, Iterator[Map]]]]:
    """Name → seed → (evaluations spent before the first map, the maps in order)."""
    both, one = ("widest", "lowest"), ("widest",)
    catalogue = catalogue_of(oracle)
    unknown = before_any_trial(catalogue, _as_effects(oracle, np.zeros(oracle.sizes.shape)))
    estimated = before_any_trial(catalogue, _as_effects(oracle, oracle.gradient))
    ends = tuple((k,) * len(oracle.components) for k in (0, len(oracle.precisions) - 1))
    by_size = before_any_trial(catalogue, _as_effects(oracle, _effects_of_size(oracle, *ends)))
    probes = tuple(_probes(oracle, both))
    measured = [(catalogue.decode(chosen), float(oracle.log_increase[chosen])) for chosen in probes]
    probed = before_any_trial(catalogue, _as_effects(oracle, _effects(oracle, both)), measured)
    seeds = (*probes, *itertools.islice(integer_programme(oracle, both), len(probes), len(probes) + 12))

    def of(sampler: str, queued: tuple[Map, ...]) -> Callable[[int], tuple[int, Iterator[Map]]]:
        return lambda seed: (0, sampled(oracle, sampler, seed, queued, unknown))

    found: dict[str, Callable[[int], tuple[int, Iterator[Map]]]] = {
        "front": lambda seed: (0, sampled(oracle, "front", seed, ends, by_size)),
        "front, gradient probe": lambda seed: (
            gradient_cost(name),
            sampled(oracle, "front", seed, ends[:1], estimated),
        ),
        "front, measured probes": lambda seed: (0, sampled(oracle, "front", seed, probes, probed)),
        "integer programme": lambda seed: (0, integer_programme(oracle, both)),
        "integer programme, one end": lambda seed: (0, integer_programme(oracle, one)),
        "sensitivity-greedy": lambda seed: (0, greedy(oracle, "sensitivity")),
        "size-greedy": lambda seed: (0, greedy(oracle, "size")),
        "random": of("random", ()),
    }
    # Optuna's Gaussian process takes too long for two oracles: on the first only
    for sampler in ("tpe", "nsga2", "gp") if name == "two" else ("tpe", "nsga2"):
        found[sampler] = of(sampler, ())
        found[f"{sampler}, seeded"] = of(sampler, seeds)
    return found


def _effects_of_size(oracle: Oracle, widest: Map, lowest: Map) -> np.ndarray:
    """What a study with `probe = "none"` expects: by size and bits, scaled to what the lowest map costs, `[n, k]`."""
    variance = np.array([4.0 ** -get_precision(name).bits for name in oracle.precisions])
    raw = oracle.sizes[:, :1] * (variance - variance[0])  # all widest are int8: bytes in proportion to parameters
    total = float(oracle.log_increase[lowest] - oracle.log_increase[widest])
    return np.asarray(raw * total / raw[:, -1].sum())


def _as_effects(oracle: Oracle, effects: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        name: {p: float(effects[c, k]) for k, p in enumerate(oracle.precisions)}
        for c, name in enumerate(oracle.components)
    }
