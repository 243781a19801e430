"""Maps of a study held against its certify windows, each noted in the run directory as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from search.base.certifiable import alike_near
from search.base.front import Point
from search.base.progress import slow
from search.measure.racing import FIRST_RUNG, judge
from search.problem.judge import Judge
from search.problem.run_directory import CERTIFY_BASELINE, TRIES, RunDirectory, mark_of
from search.problem.workspace import Workspace
from search.results.certify import Certificate, Held, certify, held_of
from search.results.ledger import entries_of
from search.results.plans import plans
from search.run.prepare import Say, certifying_of
from ssm_mp.evaluation.evaluate import Evaluation, differences
from ssm_mp.model import LanguageModel

_LOOKS = (4, 2)
"""A map is looked at after a quarter and a half of the certify windows; one that clearly fails sees no more."""
_STOPPED_WRONGLY = 0.01
"""Chance that a map is stopped whose mean on all windows is within the budget: such a map is lost, none is won."""


def certify_front(
    workspace: Workspace, run: RunDirectory, front: list[Point], searched: Sequence[np.ndarray], say: Say
) -> Certificate | None:
    """Test a front, the smallest map first, in sequences from its safest maps to its smallest.

    searched: log-increases of the search windows, `[w]` of each map that has seen all of them.
    """
    budget, sources = workspace.spec.search.budget_percent, workspace.splits.search.sources
    known = replace(certifying_of(workspace), alike=alike_near(searched, sources, budget))
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
    reference = cache(lambda: certify_baseline(workspace, run))  # only where a map is tried that was not yet
    certifier = Judge(workspace.model, windows, spec.search.metric)

    def measure(point: Point) -> Held:
        model = workspace.converter.convert(workspace.space.map(point.map))
        budget, what = spec.search.budget_percent, f"certifying trial {point.trial}"
        return held(model, certifier, reference(), budget, spec.data.seed, what)

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
    model: LanguageModel, certifier: Judge, reference: Evaluation, budget_percent: float, seed: int, what: str
) -> Held:
    """A model against the FP32 checkpoint's evaluation of the judge's windows; in parts, so that it may stop early.

    The parts are random ones: the text's beginning is no sample of it. A model that is read layer by layer is not
    looked at in between, since each part would read it anew.
    """
    count, sources = reference.windows, certifier.windows.sources
    order = np.random.default_rng(seed).permutation(count)
    looks = [] if model.after_layer is not None else [n for n in (count // part for part in _LOOKS) if n >= FIRST_RUNG]
    rises = np.full(count, np.nan)
    began = 0
    for until in (*looks, count):
        new, seen = order[began:until], np.sort(order[:until])
        fp32 = Evaluation(reference.nll[new], reference.predicted)
        rises[new] = differences(_evaluated(certifier, model, new, what), fp32)
        found = held_of(rises[seen], None if sources is None else sources[seen])
        if until < count and judge(rises[seen], count, budget_percent, None, _STOPPED_WRONGLY):
            return replace(found, stopped=True)
        began = until
    return found


def certify_baseline(workspace: Workspace, run: RunDirectory) -> Evaluation:
    """The FP32 checkpoint on the certify windows, evaluated once by a study."""
    windows = workspace.splits.certify
    depends = {name: workspace.fingerprint()[name] for name in ("checkpoint", "compute")}
    mark = mark_of({**depends, "certify windows": windows.digest})
    stored = run.read_json(CERTIFY_BASELINE)
    if isinstance(stored, dict) and stored.get("mark") == mark:
        return Evaluation(np.array(stored["nll"], dtype=np.float64), stored["predicted"])
    found = _evaluated(Judge(workspace.model, windows, "perplexity"), workspace.model, None, "certifying: FP32")
    run.write_json(CERTIFY_BASELINE, {"mark": mark, "predicted": found.predicted, "nll": found.nll.tolist()})
    return found


def _evaluated(certifier: Judge, model: LanguageModel, at: np.ndarray | None, what: str) -> Evaluation:
    """On the certify windows with numbers `at` (None: all)."""
    progress = slow(what, certifier.layer_calls(model, at))
    found = certifier(model, at, progress.step)
    progress.close()
    return found
