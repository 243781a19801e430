"""What a proposal of the sampler `front` costs, against components and trials; and what the template saves.

    OMP_NUM_THREADS=1 python -m benchmarks.proposals [--json]      # a minute on one core

The storage is in memory, effects are drawn at random and add up, components are as large as those of a Mamba.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState, create_trial

from search.sampling.catalogue import Catalogue
from search.sampling.front_sampler import FrontSampler
from search.sampling.knowledge import before_any_trial

PRECISIONS = ("fp16", "int8", "nf4", "int3")
BITS = np.array([16.0, 8.25, 4.25, 3.25])
CASES = ((22, 64), (22, 300), (25, 300), (120, 300), (320, 300))
REPEATS = 12


def catalogue_of(components: int) -> Catalogue:
    """Components of the sizes that a Mamba's have, in turn."""
    weights = [65536, 1024, 10240, 2048, 32768]
    sizes = tuple(tuple(int(weights[c % 5] * b / 8) for b in BITS) for c in range(components))
    names = tuple(f"c{c}" for c in range(components))
    return Catalogue(names, (PRECISIONS,) * components, sizes, 10000, int(sum(s[0] for s in sizes) * 2))


def studied(catalogue: Catalogue, trials: int, rng: np.random.Generator) -> tuple[Study, FrontSampler]:
    """A study with finished trials near the front, and its sampler, which has a rough idea of the effects."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    components = len(catalogue.names)
    true = rng.lognormal(0, 1, (components, 1)) * np.array([0, 0.01, 0.2, 1.0]) * 0.3 / components
    rough = true * rng.lognormal(0, 0.5, true.shape)
    effects = {
        name: dict(zip(PRECISIONS, map(float, row), strict=True))
        for name, row in zip(catalogue.names, rough, strict=True)
    }
    sampler = FrontSampler(before_any_trial(catalogue, effects), 5.0, 0)
    study = optuna.create_study(directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE], sampler=sampler)
    space: dict[str, Any] = {name: CategoricalDistribution(PRECISIONS) for name in catalogue.names}
    for _ in range(trials):
        chosen = (rng.random(components) < rng.random()) + 1 + (rng.random(components) < 0.2)
        increase = 100 * np.expm1(true[np.arange(components), chosen].sum() + rng.normal() * 1e-4)
        values = [catalogue.fp32_bytes / catalogue.bytes(chosen[None])[0], float(increase)]
        params = catalogue.decode(chosen)
        study.add_trial(create_trial(state=TrialState.COMPLETE, values=values, params=params, distributions=space))
    return study, sampler


def measure(components: int, trials: int) -> dict[str, float]:
    """Milliseconds a proposal: the first one, which learns the spreads, apart from the others."""
    study, sampler = studied(catalogue_of(components), trials, np.random.default_rng(0))
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        assert sampler.propose(study) is not None
        times.append(1e3 * (time.perf_counter() - began))
    # one proposal in eight learns anew: spread over all of them
    mean = statistics.median(times[1:]) + (times[0] - statistics.median(times[1:])) / 8
    return {
        "components": components,
        "trials": trials,
        "ms": mean,
        "learning_ms": times[0],
        "others_ms": statistics.median(times[1:]),
    }


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    rows = [measure(*case) for case in CASES]
    if arguments.parse_args().json:
        print(json.dumps({"proposals": rows}))
        return
    for row in rows:
        print(
            f"{row['components']:4.0f} components, {row['trials']:4.0f} trials: {row['ms']:6.1f} ms a proposal "
            f"({row['others_ms']:.1f}; every eighth {row['learning_ms']:.0f})"
        )


if __name__ == "__main__":
    main()
