"""The front sampler's aim at what can be certified: a share of what it proposes for the winner, and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial

from search.base.certifiable import Certifying
from search.sampling import front_sampler
from search.sampling.catalogue import Catalogue
from search.sampling.front_sampler import FrontSampler
from search.sampling.knowledge import before_any_trial
from search.sampling.posterior import Posterior
from search.sampling.proposal import Evaluated, propose
from search.trials.attributes import DIFFERENCES, MEASURED, packed

NAMES, PRECISIONS = tuple(f"c{i}" for i in range(8)), ("int8", "nf4", "int3")
CATALOGUE = Catalogue(NAMES, (PRECISIONS,) * 8, tuple((800 + 90 * i, 420 + 47 * i, 320 + 35 * i) for i in range(8)),
                      500, 40000)  # fmt: skip
EFFECT = np.array([[0, 0.0004 * (i + 1), 0.003 * (8 - i)] for i in range(8)])
KNOWLEDGE = before_any_trial(
    CATALOGUE, {name: dict(zip(PRECISIONS, row.tolist(), strict=True)) for name, row in zip(NAMES, EFFECT, strict=True)}
)
BUDGET, CERTIFIABLE = 5.0, 3.0


def told(count: int, last: np.ndarray | None = None) -> tuple[Evaluated, Posterior]:
    """So many maps, from the widest to this one, and what is known after them."""
    choices = np.random.default_rng(0).choice(3, (count, 8), p=(0.5, 0.3, 0.2))
    choices[0] = 0
    if last is not None:
        choices[-1] = last
    rises = EFFECT[np.arange(8), choices].sum(axis=1)
    return Evaluated(choices, 100 * np.expm1(rises)), KNOWLEDGE.posterior(choices, rises, np.zeros(count))


@pytest.mark.parametrize("count", range(1, 25))
def test_every_second_proposal_for_the_winner_aims_and_no_other_changes(count: int) -> None:
    evaluated, posterior = told(count)
    plain, aimed = (
        propose(CATALOGUE, posterior, evaluated, [], BUDGET, np.random.default_rng(1), certifiable_percent=within)
        for within in (None, CERTIFIABLE)
    )
    assert plain is not None
    assert aimed is not None
    for_winner, rest = divmod(len({row.tobytes() for row in evaluated.choices}), 4)
    if rest or for_winner % 2 == 0:
        assert (aimed == plain).all()
        return
    known = CATALOGUE.bytes(evaluated.choices)
    certifiable = known[evaluated.increase_percent <= CERTIFIABLE].min()
    assert CATALOGUE.bytes(aimed[None])[0] < certifiable
    assert 100 * np.expm1(EFFECT[np.arange(8), aimed].sum()) <= CERTIFIABLE + 0.2  # the effects are nearly known
    assert 100 * np.expm1(EFFECT[np.arange(8), plain].sum()) > CERTIFIABLE + 0.2  # which without an aim is passed


def test_a_map_that_can_be_certified_is_sought_though_a_smaller_one_is_within_the_budget() -> None:
    every = np.array(list(itertools.product(range(3), repeat=8)))
    rises, sizes = 100 * np.expm1(EFFECT[np.arange(8), every].sum(axis=1)), CATALOGUE.bytes(every)
    winner, best = (np.where(rises <= within, sizes, np.inf).argmin() for within in (BUDGET, CERTIFIABLE))
    evaluated, posterior = told(12, every[winner])
    rng = np.random.default_rng(1)
    aimed = propose(CATALOGUE, posterior, evaluated, [], BUDGET, rng, certifiable_percent=CERTIFIABLE)
    assert aimed is not None
    assert 100 * np.expm1(EFFECT[np.arange(8), aimed].sum()) <= CERTIFIABLE + 0.2
    assert sizes[winner] < CATALOGUE.bytes(aimed[None])[0] <= 1.01 * sizes[best]


def study_of(noise: float, alike: bool = True) -> optuna.Study:
    """Three maps, the middle one near the budget, on 64 windows whose log-increases scatter by so much.

    alike: whether the four windows of a document agree.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, rng = optuna.create_study(directions=["maximize", "minimize"]), np.random.default_rng(0)
    for k, percent in enumerate((0.1, 4.8, 9.0)):
        scatter = np.repeat(rng.standard_normal(16), 4) if alike else rng.standard_normal(64)
        held = np.log1p(percent / 100) + noise * scatter
        measured = {
            "increase_percent": percent, "windows": 64, "of_windows": 64,
            "stderr_percent": float((100 + percent) * noise / 8),
        }  # fmt: skip
        study.add_trial(create_trial(
            params=dict.fromkeys(NAMES, PRECISIONS[k]), values=[2.0, percent],
            distributions={name: CategoricalDistribution(PRECISIONS) for name in NAMES},
            user_attrs={MEASURED: measured, DIFFERENCES: packed(held)},
        ))  # fmt: skip
    return study


def aim_of(study: optuna.Study, certifying: Certifying | None, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """What the sampler asks for as the largest increase that is likely to be certified."""
    asked: list[float | None] = []

    def seen(*given: object, certifiable_percent: float | None, **others: object) -> np.ndarray:
        asked.append(certifiable_percent)
        return np.zeros(8, dtype=np.int64)

    monkeypatch.setattr(front_sampler, "propose", seen)
    FrontSampler(replace(KNOWLEDGE, certifying=certifying), BUDGET, 0).propose(study)
    return asked[0]


def test_the_aim_is_below_the_budget_by_what_the_certificate_is_expected_to_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many, few = Certifying(2000, 0.03), Certifying(64, 0.03)
    documents = replace(few, searched=np.arange(64) // 4, certified=np.arange(64) // 4)

    def aim(noise: float, certifying: Certifying | None, alike: bool = True) -> float | None:
        return aim_of(study_of(noise, alike), certifying, monkeypatch)

    assert aim(0.04, None) is None
    assert aim_of(optuna.create_study(directions=["maximize", "minimize"]), many, monkeypatch) is None
    quiet, loud, fewer = aim(0.01, many), aim(0.04, many), aim(0.04, few)
    unlike, alike = aim(0.04, documents, alike=False), aim(0.04, documents)
    assert quiet is not None
    assert loud is not None
    assert fewer is not None
    assert unlike is not None
    assert alike is not None
    assert BUDGET > quiet > loud > fewer > unlike > alike + 0.5 > 0
