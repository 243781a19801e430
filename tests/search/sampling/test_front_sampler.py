"""The sampler `front` against exhaustive truth, alone, in threads and beside other workers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from search.sampling.catalogue import Catalogue
from search.sampling.front_sampler import FrontSampler
from search.sampling.gain import area, staircase, terrain, volume
from search.sampling.knowledge import before_any_trial
from search.sampling.posterior import Observations, fit_posterior
from search.sampling.proposal import Evaluated, propose

NAMES = tuple(f"c{i}" for i in range(8))
PRECISIONS = ("int8", "nf4", "int3")
SIZES = tuple((800 + 90 * i, 420 + 47 * i, 320 + 35 * i) for i in range(8))
CATALOGUE = Catalogue(NAMES, (PRECISIONS,) * 8, SIZES, 500, 40000)
EFFECT = np.array([[0, 0.0004 * (i + 1), 0.003 * (8 - i)] for i in range(8)])
BUDGET = 5.0


def truth(choices: np.ndarray) -> float:
    cost = EFFECT[np.arange(8), choices]
    return float(100 * np.expm1(0.002 + cost.sum() + 0.5 * (cost.sum() ** 2 - (cost**2).sum())))


def expected() -> dict[str, dict[str, float]]:
    rough = EFFECT * np.random.default_rng(0).lognormal(0.3, 0.5, EFFECT.shape)
    return {name: dict(zip(PRECISIONS, map(float, row), strict=True)) for name, row in zip(NAMES, rough, strict=True)}


def new_sampler(seed: int = 0) -> FrontSampler:
    return FrontSampler(before_any_trial(CATALOGUE, expected()), BUDGET, seed)


def new_study(seed: int = 0) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=new_sampler(seed))


def objective(trial: optuna.Trial) -> tuple[float, float]:
    chosen = CATALOGUE.encode({name: trial.suggest_categorical(name, PRECISIONS) for name in NAMES})
    return 40000 / CATALOGUE.bytes(chosen[None])[0], truth(chosen)


def fraction(study: optuna.Study) -> float:
    every = np.array(list(itertools.product(range(3), repeat=8)))
    exact = staircase(40000 / CATALOGUE.bytes(every), np.array([truth(row) for row in every]), BUDGET)
    values = np.array([trial.values for trial in study.trials])
    return area(staircase(values[:, 0], values[:, 1], BUDGET), BUDGET) / area(exact, BUDGET)


def test_it_finds_almost_the_whole_front_in_few_evaluations() -> None:
    study = new_study()
    study.optimize(objective, n_trials=40)
    assert fraction(study) > 0.99
    random = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(0))
    random.optimize(objective, n_trials=40)
    assert fraction(random) < 0.9


def test_no_map_is_proposed_twice_even_in_threads() -> None:
    study = new_study()
    study.optimize(objective, n_trials=30, n_jobs=4)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 30


def test_workers_that_ask_before_anybody_has_told_get_different_maps() -> None:
    study, sampler = new_study(), new_sampler()
    with ThreadPoolExecutor(4) as pool:
        asked = [found.params for found in pool.map(lambda _: sampler.propose(study), range(12)) if found is not None]
    assert len({tuple(params.items()) for params in asked}) == 12


def test_maps_of_other_workers_are_never_proposed() -> None:
    study = new_study()
    space: dict[str, Any] = {name: CategoricalDistribution(PRECISIONS) for name in NAMES}
    first = new_sampler().propose(study)
    assert first is not None
    for state in (TrialState.RUNNING, TrialState.WAITING):
        study.add_trial(create_trial(state=state, params=dict(first.params), distributions=space))
        assert new_sampler().propose(study) != first


def test_one_seed_gives_one_sequence() -> None:
    runs = []
    for _ in range(2):
        study = new_study(5)
        study.optimize(objective, n_trials=12)
        runs.append([trial.params for trial in study.trials])
    assert runs[0] == runs[1]


def test_an_exhausted_space_is_said_to_be() -> None:
    small = Catalogue(("a", "b"), (("fp16", "int8"),) * 2, ((20, 10), (40, 20)), 0, 100)
    effects = {name: {"fp16": 0.0, "int8": 0.01} for name in ("a", "b")}
    knowledge = before_any_trial(small, effects)
    rng = np.random.default_rng(0)
    seen: list[np.ndarray] = []
    posterior = fit_posterior(knowledge.prior, Observations(np.zeros((0, 2)), np.zeros(0), np.zeros(0)))
    for _ in range(4):
        found = propose(small, posterior, Evaluated(np.zeros((0, 2), dtype=np.int64), np.zeros(0)), seen, 5.0, rng)
        assert found is not None
        seen.append(found)
    assert len({tuple(row) for row in seen}) == 4
    assert propose(small, posterior, Evaluated(np.zeros((0, 2), dtype=np.int64), np.zeros(0)), seen, 5.0, rng) is None


@pytest.mark.parametrize("target", [0, 1])
def test_optunas_importances_understand_the_parameters(target: int) -> None:
    study = new_study()
    study.optimize(objective, n_trials=25)
    found = optuna.importance.get_param_importances(study, target=lambda trial: trial.values[target])
    assert found.keys() == set(NAMES)


# which precision is the fastest has nothing to do with its size
TIMES = tuple(tuple(map(int, row)) for row in np.random.default_rng(1).integers(200, 1200, (8, 3)))
TIMED = replace(CATALOGUE, latencies=TIMES, fixed_latency=2000)


def timed_study(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)


def timed_objective(trial: optuna.Trial) -> tuple[float, float, float]:
    chosen = TIMED.encode({name: trial.suggest_categorical(name, PRECISIONS) for name in NAMES})
    seconds = TIMED.by_latency.bytes(chosen[None])[0] / 1e9
    return 40000 / TIMED.bytes(chosen[None])[0], truth(chosen), seconds


EVERY = np.array(list(itertools.product(range(3), repeat=8)))
EVERY_VALUES = np.column_stack(
    [40000 / TIMED.bytes(EVERY), [truth(row) for row in EVERY], TIMED.by_latency.bytes(EVERY) / 1e9]
)


def volume_of(values: np.ndarray) -> float:
    """Exact volume of maps with values `[t, 3]`."""
    saved = 1 - 1e9 * values[:, 2] / TIMED.latency_reference
    return volume(terrain(values[:, 0], saved, values[:, 1], BUDGET, most=10**6), BUDGET)


def test_the_front_of_three_objectives_is_found_in_few_evaluations() -> None:
    study = timed_study(FrontSampler(before_any_trial(TIMED, expected()), BUDGET, 0))
    study.optimize(timed_objective, n_trials=60)
    whole = volume_of(EVERY_VALUES)
    values = np.array([trial.values for trial in study.trials])
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 60
    assert volume_of(values) / whole > 0.99
    within, all_within = values[values[:, 1] <= BUDGET], EVERY_VALUES[EVERY_VALUES[:, 1] <= BUDGET]
    assert within[:, 0].max() == all_within[:, 0].max()  # the smallest and the fastest of all 6561 maps
    assert within[:, 2].min() == all_within[:, 2].min()
    random = timed_study(optuna.samplers.RandomSampler(0))
    random.optimize(timed_objective, n_trials=60)
    assert volume_of(np.array([trial.values for trial in random.trials])) / whole < 0.8


def test_a_sampler_that_knows_no_latency_misses_part_of_the_front_of_three() -> None:
    study = new_study()
    study.optimize(objective, n_trials=60)
    rows = np.array([TIMED.encode(trial.params) for trial in study.trials])
    values = np.column_stack([[t.values for t in study.trials], TIMED.by_latency.bytes(rows) / 1e9])
    assert volume_of(values) / volume_of(EVERY_VALUES) < 0.95


def test_an_exhausted_space_of_three_objectives_is_said_to_be() -> None:
    small = Catalogue(("a", "b"), (("fp16", "int8"),) * 2, ((20, 10), (40, 20)), 0, 100, ((5, 5), (5, 5)), 3)
    effects = {name: {"fp16": 0.0, "int8": 0.01} for name in ("a", "b")}
    study = timed_study(sampler := FrontSampler(before_any_trial(small, effects), BUDGET, 0))
    found = [sampler.propose(study) for _ in range(5)]
    assert len({tuple(proposal.params.values()) for proposal in found if proposal is not None}) == 4
    assert found[4] is None


@pytest.mark.parametrize("own", [None, "3"])
def test_the_samplers_algebra_runs_in_one_thread_unless_the_user_says_otherwise(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment |= {} if own is None else {"OPENBLAS_NUM_THREADS": own}
    # what the command line imports first must not have loaded numpy by then
    script = "import sys, os, search; assert 'numpy' not in sys.modules; print(os.environ['OPENBLAS_NUM_THREADS'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{own or 1}\n"
