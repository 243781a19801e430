"""What every sampler that a study may name keeps to, on a space small enough to be tried whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState, create_trial

from search.problem.spec import SAMPLERS
from search.sampling.catalogue import Catalogue
from search.sampling.knowledge import before_any_trial
from search.sampling.sampler import Asked, Proposal, Proposer, make_sampler, proposer
from search.trials.attributes import MEASURED
from search.trials.maps import map_key
from search.trials.optuna_storage import create, handle

SPACE = {"a": ("fp16", "int8", "nf4"), "b": ("fp16",), "c": ("fp16", "int8", "nf4", "int3")}
MAPS = 3 * 1 * 4
SIZES = {"fp16": 400, "int8": 200, "nf4": 110, "int3": 90}
COST = {"fp16": 0.0, "int8": 0.002, "nf4": 0.02, "int3": 0.04}
NANOSECONDS = {"fp16": 500, "int8": 300, "nf4": 700, "int3": 900}
BUDGET = 5.0
ENDS = (TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED)
"""What becomes of trials, in turn."""

every_sampler = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name for name in SAMPLERS]
)
for_each_goal = pytest.mark.parametrize("latency", [False, True], ids=["two objectives", "three objectives"])


def new_study(name: str, seed: int = 3, latency: bool = False) -> Study:
    """A study with a sampler that knows what is to be known before any trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def each(figures: dict[str, int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(figures[precision] for precision in held) for held in SPACE.values())

    times = each(NANOSECONDS) if latency else None
    catalogue = Catalogue(tuple(SPACE), tuple(SPACE.values()), each(SIZES), 50, 2400, times, 100 if latency else 0)
    knowledge = before_any_trial(catalogue, {name: {p: COST[p] for p in held} for name, held in SPACE.items()})
    asked = Asked({name: CategoricalDistribution(held) for name, held in SPACE.items()}, seed, knowledge, BUDGET)
    maximize, minimize = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    directions = [maximize, minimize, minimize] if latency else [maximize, minimize]
    return optuna.create_study(directions=directions, sampler=make_sampler(name, asked))


def written(study: Study, proposal: Proposal, state: TrialState = TrialState.RUNNING) -> optuna.Trial:
    """The trial of a proposal, in one operation, as `search.run.claim` does it."""
    space: dict[str, Any] = {name: CategoricalDistribution(held) for name, held in SPACE.items()}
    template = create_trial(
        state=state, params=dict(proposal.params), distributions=space, system_attrs=dict(proposal.attributes)
    )
    return handle(study, create(study, template))


def tell(study: Study, trial: optuna.Trial, state: TrialState, latency: bool = False) -> None:
    """The end of a trial, as `search.run.claim` tells it."""
    if state == TrialState.FAIL:
        study.tell(trial, state=state)
        return
    size = 50 + sum(SIZES[precision] for precision in trial.params.values())
    percent = 100 * sum(COST[precision] for precision in trial.params.values())
    figures = {"increase_percent": percent, "stderr_percent": 0.1, "windows": 20, "of_windows": 40}
    trial.set_user_attr(MEASURED, figures)
    trial.set_constraint("budget", percent - BUDGET)
    if state == TrialState.PRUNED:
        study.tell(trial, state=state)
        return
    seconds = sum(NANOSECONDS[precision] for precision in trial.params.values()) / 1e9
    study.tell(trial, [2400 / size, percent, *([seconds] if latency else [])])


def proposed(study: Study) -> Proposal:
    found = proposer(study).propose(study)
    assert found is not None
    return found


def sequence(study: Study, count: int, latency: bool = False, before: Callable[[], None] = lambda: None) -> list[str]:
    """Keys of the maps that a study tries one after another."""
    keys = []
    for number in range(count):
        before()
        found = proposed(study)
        keys.append(map_key(found.params))
        tell(study, written(study, found), ENDS[number % len(ENDS)], latency)
    return keys


@every_sampler
def test_it_is_a_sampler_of_optunas_that_proposes_whole_maps(name: str) -> None:
    study = new_study(name)
    assert isinstance(study.sampler, optuna.samplers.BaseSampler)
    assert isinstance(study.sampler, Proposer)


@every_sampler
@for_each_goal
def test_every_map_is_proposed_once_whatever_becomes_of_it_and_then_none(name: str, latency: bool) -> None:
    study = new_study(name, latency=latency)
    assert len(set(sequence(study, MAPS, latency))) == MAPS
    assert {trial.state for trial in study.trials} == set(ENDS)
    assert proposer(study).propose(study) is None


@every_sampler
def test_a_map_has_every_component_at_one_of_its_own_choices(name: str) -> None:
    study = new_study(name)
    for number in range(MAPS // 2):
        found = proposed(study)
        assert found.params.keys() == SPACE.keys()
        assert all(found.params[component] in held for component, held in SPACE.items())
        tell(study, written(study, found), ENDS[number % len(ENDS)])


@every_sampler
def test_what_it_notes_on_a_trial_can_be_stored(name: str) -> None:
    study = new_study(name)
    for _ in range(3):
        found = proposed(study)
        assert json.loads(json.dumps(found.attributes)) == found.attributes
        tell(study, written(study, found), TrialState.COMPLETE)


@every_sampler
def test_one_seed_gives_one_sequence(name: str) -> None:
    assert sequence(new_study(name), 6) == sequence(new_study(name), 6)


@every_sampler
@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.WAITING])
def test_maps_that_are_under_way_elsewhere_are_not_proposed(name: str, state: TrialState) -> None:
    study = new_study(name)
    for number in range(MAPS):  # by another worker each, which no other has told anything
        study.sampler = new_study(name, seed=number).sampler
        written(study, proposed(study), state)
    assert len({map_key(trial.params) for trial in study.trials}) == MAPS
    assert proposer(study).propose(study) is None


@every_sampler
def test_a_proposal_that_became_no_trial_may_be_proposed_again(name: str) -> None:
    study = new_study(name)

    def dropped() -> None:
        proposer(study).forget(proposed(study))

    assert len(set(sequence(study, MAPS, before=dropped))) == MAPS


@every_sampler
def test_a_queued_map_is_evaluated_as_it_was_queued(name: str) -> None:
    study = new_study(name)
    queued = {component: held[-1] for component, held in SPACE.items()}
    study.enqueue_trial(queued)
    trial = study.ask()
    chosen = {component: trial.suggest_categorical(component, held) for component, held in SPACE.items()}
    assert chosen == queued
    tell(study, trial, TrialState.COMPLETE)
    assert map_key(queued) not in sequence(study, MAPS - 1)


@every_sampler
def test_under_optunas_own_loop_it_is_a_sampler_like_any_other(name: str) -> None:
    study = new_study(name)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        chosen = [trial.suggest_categorical(component, held) for component, held in SPACE.items()]
        return 2400 / (50 + sum(SIZES[p] for p in chosen)), 100 * sum(COST[p] for p in chosen)

    study.optimize(objective, n_trials=MAPS)
    assert len({map_key(trial.params) for trial in study.trials}) == MAPS
