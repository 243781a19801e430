"""The Optuna study of a run: open or continue it, its seeds, and how many trials it is to have."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import TrialState

from search.base.errors import StudyError
from search.problem.groups import expanded, groups_in
from search.problem.run_directory import RunDirectory, require_same, with_all
from search.problem.spec import StudySpec
from search.run.claim import Choices, Seed, enqueue, queue
from search.sampling.front_sampler import FrontSampler
from search.sampling.knowledge import Knowledge
from search.sampling.sampler import Asked, make_sampler
from search.trials.attributes import FINISHED, MEASURED, ORIGIN, REOPENED
from search.trials.maps import complete_maps, map_key, map_of
from search.trials.read_back import ASKED, CONTINUES, FINGERPRINT_ATTRIBUTE, PRECISION, counts, precision_of
from search.trials.storage import MOVED, OpenStudy, Say, choose_storage, connect, name_metrics
from ssm_mp.evaluation.latency import LatencyTable


def open_study(
    spec: StudySpec,
    run: RunDirectory,
    space: Choices,
    fingerprint: Mapping[str, Any],
    knowledge: Knowledge | None = None,
    latency: LatencyTable | None = None,
    *,
    worker: str = "",
    many: bool = False,
    say: Say = lambda line: None,
) -> OpenStudy:
    """Create or load the study of a run; `space` is the free components' choices, `knowledge` for sampler `front`.

    latency: the table that the study's third objective is predicted from. worker: its name, so that each proposes
    other maps; many: whether there may be others.
    Raises StudyError where the storage holds a study with another fingerprint.
    """
    opened = connect(choose_storage(spec, run, many=many, say=say), run, say)
    if latency is not None:
        groups = groups_in(fingerprint)
        opened = replace(opened, latency=lambda params: latency.predict(expanded(params, groups)))
        fingerprint = {**fingerprint, "latency table": latency.digest}
    opened.patiently(lambda: _sign(opened, json.loads(json.dumps(fingerprint)), f"{run.path} ({opened.choice.kind})"))
    study = opened.study
    opened.patiently(lambda: _note_precision(study, precision_of(spec)))
    distributions = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    # another seed for every continuation and worker, or the sampler would propose the same maps again
    held = opened.patiently(lambda: study.get_trials(deepcopy=False))
    drawn = spec.search.seed + len(held) + zlib.crc32(worker.encode()) * bool(worker)
    search = spec.search
    study.sampler = make_sampler(search.sampler, Asked(distributions, drawn % 2**32, knowledge, search.budget_percent))
    return opened


def _sign(opened: OpenStudy, fingerprint: Mapping[str, Any], where: str) -> None:
    """Put the fingerprint on a new study, or compare it with the one that is there."""
    study = opened.study
    with opened.locked():
        if FINGERPRINT_ATTRIBUTE in study.user_attrs:
            stored = study.user_attrs[FINGERPRINT_ATTRIBUTE]
            require_same(stored, with_all(stored, fingerprint), where)
            return
        study.set_user_attr(FINGERPRINT_ATTRIBUTE, fingerprint)
        name_metrics(study)


def _note_precision(study: Study, precision: Mapping[str, list[str]]) -> None:
    """Put what the study file says of the space on a study."""
    if study.user_attrs.get(PRECISION) != precision:
        study.set_user_attr(PRECISION, dict(precision))


def begin(opened: OpenStudy, seeds: Iterable[Seed], space: Choices, trials: int, budget_percent: float) -> int:
    """Queue the seeds, and what a lower budget stopped; returns how many finished trials the study is to have.

    Whichever worker comes first does it; the others find it done. Where the space has just grown, what is queued now
    comes on top of what the smaller space has finished. Raises StudyError where it grew after the study was opened.
    """
    study, request = opened.study, {"trials": trials, "budget_percent": budget_percent}
    with opened.locked():
        attributes = study.user_attrs
        if MOVED in attributes:
            raise StudyError("the space of this study has just grown, by another process; start this one again")
        enqueue(study, seeds, space)
        stored = attributes.get(ASKED, {})
        if {key: stored.get(key) for key in request} == request:
            return int(stored["asked"])
        reopened = reconsider(study, space, budget_percent)
        found = counts(study)
        asked = max(trials, found.finished if reopened else 0) + reopened
        if not stored and CONTINUES in attributes:
            asked = max(asked, found.finished + found.waiting)
        study.set_user_attr(ASKED, {**request, "asked": asked})
        return asked


def reconsider(study: Study, space: Choices, budget_percent: float) -> int:
    """Queue the maps again that were stopped as over a budget lower than this one; returns how many."""
    trials = study.get_trials(deepcopy=False)
    known = {map_key(map_of(t)) for t in trials if t.state not in (TrialState.PRUNED, TrialState.FAIL)}
    queued = 0
    for trial in trials:
        measured = trial.user_attrs.get(MEASURED, {})
        over = trial.state == TrialState.PRUNED and measured.get("stopped") == "over budget"
        if over and measured.get("lower_percent", np.inf) <= budget_percent and map_key(map_of(trial)) not in known:
            again = Seed(map_of(trial), trial.user_attrs.get(ORIGIN, ""))
            queue(study, again, space, {REOPENED: trial.number})
            known.add(map_key(map_of(trial)))
            queued += 1
    return queued


def is_exhausted(study: Study, space: Choices) -> bool:
    """Whether every map of the space has been tried."""
    return len(complete_maps(study, space)) >= int(np.prod([len(held) for held in space.values()], dtype=object))


def prediction_error(knowledge: Knowledge, study: Study) -> float | None:
    """Root mean square of what the surrogate misses each finished map by, predicted from all the others.

    In log-perplexity; maps that were probed as well are left out. None below three finished trials.
    """
    catalogue = knowledge.catalogue
    probed = {row.tobytes() for row in knowledge.choices}
    every = study.get_trials(deepcopy=False, states=FINISHED)
    finished = [trial for trial in every if catalogue.encode(map_of(trial)).tobytes() not in probed]
    if len(finished) < 3:
        return None
    missed = FrontSampler(knowledge, 1.0, 0).posterior(finished).leave_one_out()[-len(finished) :]
    return float(np.sqrt(np.mean(missed**2)))
