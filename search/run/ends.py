"""What preparing measures first: the FP32 baseline and both ends, each written down as soon as it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from search.base.progress import slow
from search.measure.objective import Baseline, measure_baseline
from search.measure.probe import LOWEST, WIDEST, End, open_end
from search.problem.run_directory import BASELINE, RunDirectory
from search.problem.source import source_of
from search.problem.splits import Say
from search.problem.workspace import Workspace
from ssm_mp.components import fp32_bytes
from ssm_mp.evaluation.evaluate import Evaluation, layer_calls, paired_increase

Offsets = tuple[float, float]
"""Log-increase (or divergence, where the study judges by it) over FP32 of the widest and of the lowest map."""


class Ends:
    """The ends of a study's probes; each is converted and evaluated once, when somebody asks for it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._opened: dict[str, End] = {}

    def __getitem__(self, name: str) -> End:
        if name not in self._opened:
            progress = slow(f"the {name} map", self._workspace.judge.layer_calls(self._workspace.model))
            self._opened[name] = open_end(self._workspace, name, progress.step)
            progress.close()
        return self._opened[name]

    def close(self) -> None:
        """Let their models and hidden states go."""
        self._opened.clear()


def measured_ends(run: RunDirectory, workspace: Workspace, ends: Ends, say: Say) -> tuple[Baseline, Offsets]:
    """The baseline and the increases of both ends: what is written down, and measured and written down what is not."""
    stored = _stored(run, workspace)
    if not stored or not {WIDEST, LOWEST} <= stored["ends"].keys():
        say("measuring the baseline and both ends")
    if not stored:
        stored = _described(workspace, _baseline(workspace))
        run.write_json(BASELINE, stored)
    baseline = _baseline_from(stored, workspace)
    for name in (WIDEST, LOWEST):
        if name not in stored["ends"]:
            stored["ends"][name] = paired_increase(ends[name].evaluation, baseline.evaluation).log_mean
            run.write_json(BASELINE, stored)
    return baseline, (stored["ends"][WIDEST], stored["ends"][LOWEST])


def known_baseline(run: RunDirectory, workspace: Workspace) -> Baseline:
    """The baseline that a run has measured; measured now where it has none of this fingerprint."""
    stored = _stored(run, workspace)
    return _baseline_from(stored, workspace) if stored else _baseline(workspace)


def _baseline(workspace: Workspace) -> Baseline:
    progress = slow("baseline", layer_calls(workspace.model, workspace.splits.search))
    baseline = measure_baseline(workspace, progress.step)
    progress.close()
    return baseline


def _stored(run: RunDirectory, workspace: Workspace) -> dict[str, Any]:
    """What another process or a former run measured; empty where that is missing, or of an older version."""
    stored = run.read_json(BASELINE)
    same = isinstance(stored, dict) and stored.get("fingerprint") == workspace.at_the_ends.fingerprint_digest
    return stored if same else {}


def _described(workspace: Workspace, baseline: Baseline) -> dict[str, Any]:
    return {
        "perplexity": baseline.perplexity,
        "bytes": baseline.bytes,
        **({} if (source := source_of(workspace.checkpoint)) is None else source.to_json()),
        "ends": {},
        "fingerprint": workspace.at_the_ends.fingerprint_digest,
        "predicted": baseline.evaluation.predicted,
        "nll": baseline.evaluation.nll.tolist(),
    }


def _baseline_from(stored: dict[str, Any], workspace: Workspace) -> Baseline:
    evaluation = Evaluation(np.array(stored["nll"], dtype=np.float64), stored["predicted"])
    return Baseline(evaluation, fp32_bytes(workspace.converter.components))
