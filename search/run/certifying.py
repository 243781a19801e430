"""Maps of a study held against its certify windows, each noted in the run directory as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from search.base.certifiable import alike_near
from search.base.clustered import clustered
from search.base.front import Point
from search.base.progress import slow
from search.measure.racing import FIRST_RUNG, judge
from search.problem.run_directory import CERTIFY_BASELINE, TRIES, RunDirectory, mark_of
from search.problem.workspace import Workspace
from search.results.certify import Certificate, Held, certify
from search.results.ledger import entries_of
from search.results.plans import plans
from search.run.prepare import Say, certifying_of
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import Evaluation, evaluate, layer_calls, paired_increase
from ssm_mp.model import LanguageModel

_LOOKS = (4, 2)
"""A map is looked at after a quarter and a half of the certify windows; one that clearly fails sees no more."""
_STOPPED_WRONGLY = 0.01
"""Chance that a map is stopped whose mean on all windows is within the budget: such a map is lost, none is won."""


def certify_front(
    workspace: Workspace, run: RunDirectory, front: list[Point], differences: Sequence[np.ndarray], say: Say
) -> Certificate | None:
    """Test a front, the smallest map first, in sequences from its safest maps to its smallest.

    differences: log-increases of the search windows, `[w]` of each map that has seen all of them.
    """
    budget, searched = workspace.spec.search.budget_percent, workspace.splits.search.sources
    known = replace(certifying_of(workspace), alike=alike_near(differences, searched, budget))
    planned = plans(front, budget, known)
    return _certify(workspace, run, front, planned, say)


def certify_alone(workspace: Workspace, run: RunDirectory, point: Point, say: Say) -> Certificate | None:
    """Test a map that was picked: a sequence of one."""
    return _certify(workspace, run, [point], [[point]], say)


def _certify(
    workspace: Workspace, run: RunDirectory, front: list[Point], planned: Sequence[Sequence[Point]], say: Say
) -> Certificate | None:
    spec, windows = workspace.spec, workspace.splits.certify
    if not front:
        return None
    say(f"certifying on {len(windows)} windows")
    reference = cache(lambda: _baseline(workspace, run))  # only where a map is tried that was not yet

    def measure(point: Point) -> Held:
        model = workspace.converter.convert(workspace.space.map(point.map))
        return held(model, windows, reference(), spec.search.budget_percent, spec.data.seed, f"trial {point.trial}")

    with run.lock("certify").held():  # two exports at once must not spend the same share
        return certify(
            front,
            measure,
            plans=planned,
            budget_percent=spec.search.budget_percent,
            confidence=spec.search.confidence,
            windows_digest=windows.digest,
            former=entries_of(run.read_lines(TRIES), str(run / TRIES)),
            note=lambda entry: run.append_lines(TRIES, [entry.to_json()]),
        )


def held(
    model: LanguageModel, windows: Windows, reference: Evaluation, budget_percent: float, seed: int, what: str
) -> Held:
    """A model against the FP32 checkpoint's evaluation of the same windows; in parts, so that it may stop early.

    The parts are random ones: the text's beginning is no sample of it. A model that is read layer by layer is not
    looked at in between, since each part would read it anew.
    """
    count = len(windows)
    order = np.random.default_rng(seed).permutation(count)
    looks = [] if model.after_layer is not None else [n for n in (count // part for part in _LOOKS) if n >= FIRST_RUNG]
    nll = np.full(count, np.nan)
    began = 0
    for until in (*looks, count):
        new, seen = order[began:until], np.sort(order[:until])
        nll[new] = _evaluated(model, windows.part(new), f"certifying {what}").nll
        found = _held(windows.part(seen), nll[seen], reference.nll[seen], reference.predicted)
        differences = (nll[seen] - reference.nll[seen]) / reference.predicted
        if until < count and judge(differences, count, budget_percent, None, _STOPPED_WRONGLY):
            return Held(found.increase, found.clustered, stopped=True)
        began = until
    return found


def _held(windows: Windows, nll: np.ndarray, reference: np.ndarray, predicted: int) -> Held:
    """From the negative log-likelihoods `[w]` of windows, two models'."""
    increase = paired_increase(Evaluation(nll, predicted), Evaluation(reference, predicted))
    sources = windows.sources
    return Held(increase, None if sources is None else clustered((nll - reference) / predicted, sources))


def _baseline(workspace: Workspace, run: RunDirectory) -> Evaluation:
    """The FP32 checkpoint on the certify windows, evaluated once by a study."""
    windows = workspace.splits.certify
    depends = {name: workspace.fingerprint()[name] for name in ("checkpoint", "compute")}
    mark = mark_of({**depends, "certify windows": windows.digest})
    stored = run.read_json(CERTIFY_BASELINE)
    if isinstance(stored, dict) and stored.get("mark") == mark:
        return Evaluation(np.array(stored["nll"], dtype=np.float64), stored["predicted"])
    found = _evaluated(workspace.model, windows, "certifying: FP32")
    run.write_json(CERTIFY_BASELINE, {"mark": mark, "predicted": found.predicted, "nll": found.nll.tolist()})
    return found


def _evaluated(model: LanguageModel, windows: Windows, what: str) -> Evaluation:
    progress = slow(what, layer_calls(model, windows))
    found = evaluate(model, windows, progress.step)
    progress.close()
    return found
