"""What a search will take, before any of it runs: its space, its time by parts, its memory.

Time is counted in evaluations: of all search windows by one model. How long one takes is measured here, by FP32 on a
few windows, or read off the trials that a run has made already.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from search.base.progress import slow
from search.problem.memory import needs_of, plan_memory
from search.problem.rounding import ROUNDED, below_8_bits
from search.problem.run_directory import FINGERPRINT, PROBES, RunDirectory, require_same
from search.problem.spec import StudySpec
from search.problem.splits import Say, window_length
from search.problem.workspace import Workspace, open_workspace
from search.trials.attributes import FINISHED, MEASURED
from search.trials.storage import exists, opened_as_it_is
from ssm_mp.components import Component, find_components
from ssm_mp.evaluation.evaluate import evaluate, layer_calls

_FIRST_WINDOWS = 8
"""FP32 is timed on so many; where that is quick, on four times as many, and so on."""
_QUICK_SECONDS = 1.0
_REPEATED, _PATIENCE_SECONDS = 3, 3.0
"""How often, and after how many seconds no more."""
_GRADIENTS = 21.0
"""Evaluations that gradients of all components take, whatever the depth (`python -m benchmarks.gradient`)."""
_CALIBRATION = 1.5
"""Evaluations of the calibration windows that ranges take, and the moments that rounding is compensated by."""
_ROUNDING_SECONDS = 1.4e-6
"""Of compensated rounding, a weight and a precision: on one core, both references take as much."""
_CERTIFIED = 4
"""Maps that a certificate mostly looks at, beside FP32; and the winner once more, beside FP32, for its fidelity."""
_ENDING_SECONDS = 15.0
"""Writing, reading back, timing and drawing of a small model's winner."""
_DIVERGENCE = 1.2
"""What a probe's head costs, which is held against another model's, in heads that are not."""
_STORED_FROM = 4
"""Finished trials from which on their own times are better than a guess."""


@dataclass(frozen=True)
class Forecast:
    """What a search will take. Seconds are of one process, by part, in order; `memory` is a sentence.

    moves: what changes its precision alone, or as a group; maps: how many different maps that makes, as log10, and
    exactly where they are fewer than a million. probes, trials: still to be made, of `asked` trials. windows: that the
    estimate was measured on.
    """

    components: int
    pinned: int
    moves: int
    log10_maps: float
    maps: int | None
    probes: int
    trials: int
    asked: int
    evaluation_seconds: float
    seconds: dict[str, float]
    basis: str
    memory: str
    memory_bytes: int
    perplexity: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": self.total}


def forecast(spec: StudySpec, run: RunDirectory, say: Say) -> Forecast:
    """Look at a study without changing anything. Raises what the search itself would for input or memory."""
    bare = spec.precision.model_copy(update={"activations": "none", "rounding": "nearest", "prepare": "none"})
    workspace = open_workspace(spec.model_copy(update={"precision": bare}), say)  # nothing is calibrated, or kept
    _require_same_windows(workspace, run)
    perplexity, evaluation, basis = _timed(workspace)
    known = _trial_seconds(spec, run, say)
    finished = 0 if known is None else known[0]
    each = evaluation if known is None or known[1] is None else known[1]
    if each is not evaluation:
        basis += f"; a trial's time is the mean of the {finished} that are finished"
    probes = _probes(workspace, run)
    trials = max(0, spec.search.trials - finished)
    needs = needs_of(spec, workspace.checkpoint, find_components(workspace.checkpoint), _length(workspace))
    plan = plan_memory(spec, needs)
    memory = plan.sentence.removeprefix("memory: ") or f"about {needs.all / (1 << 30):.1f} GiB of the GPU's"
    size = math.prod(len(unit.choices) for unit in workspace.space.units)
    moves = len(workspace.space.units)
    if spec.precision.group == "auto" and moves > spec.precision.max_groups:
        moves = spec.precision.max_groups
        size = len(spec.precision.choices) ** moves
    return Forecast(
        components=len(workspace.space.components),
        pinned=len(workspace.space.components) - len(workspace.space.free),
        moves=moves,
        log10_maps=math.log10(size),
        maps=size if size < 1_000_000 else None,
        probes=len(probes),
        trials=trials,
        asked=spec.search.trials,
        evaluation_seconds=evaluation,
        seconds=_parts(spec, workspace, evaluation, probes, trials * each, (run / ROUNDED).is_dir()),
        basis=basis,
        memory=memory,
        memory_bytes=plan.bound if plan.sentence else needs.all,
        perplexity=perplexity,
    )


def _require_same_windows(workspace: Workspace, run: RunDirectory) -> None:
    """Raise StudyError where the run directory is of a study with other windows; the rest is the search's to check."""
    stored, key = run.read_json(FINGERPRINT), "search windows"
    if isinstance(stored, dict):
        require_same({key: stored.get(key)}, {key: workspace.splits.search.digest}, str(run.path))


def _length(workspace: Workspace) -> int:
    return window_length(workspace.spec, workspace.checkpoint.config)


def _parts(
    spec: StudySpec, workspace: Workspace, evaluation: float, probes: list[float], trials: float, rounded: bool
) -> dict[str, float]:
    """Seconds by part. rounded: whether the run directory has the weights already whose rounding is compensated."""
    splits = workspace.splits
    calibration = _CALIBRATION * evaluation * len(splits.calibration) / len(splits.search)
    compensated = not rounded and spec.precision.rounding != "nearest" and spec.data.calibration == "text"
    narrow = below_8_bits(spec) if compensated else []
    weights = sum(component.count for component in workspace.space.free)
    certify = evaluation * len(splits.certify) / len(splits.search)
    return {
        "calibration": calibration * (spec.precision.activations == "static"),
        "rounding": calibration * bool(narrow) + _ROUNDING_SECONDS * weights * len(narrow),
        "baseline and both ends": 3 * evaluation,
        "probes": _GRADIENTS * evaluation if spec.search.probe == "gradient" else sum(probes) * evaluation,
        "trials": trials,
        "certificate": (3 + _CERTIFIED) * certify,
        "export and report": 2 * evaluation + _ENDING_SECONDS,
    }


def _timed(workspace: Workspace) -> tuple[float, float, str]:
    """FP32's perplexity on some windows, the seconds of an evaluation of all, and how these were found."""
    every, count = len(workspace.splits.search), min(_FIRST_WINDOWS, len(workspace.splits.search))
    perplexity, seconds = _quickest(workspace, count)
    while count < every and seconds < _QUICK_SECONDS:
        count = min(every, 4 * count)
        perplexity, seconds = _quickest(workspace, count)
    basis = f"FP32 on {count} of {every} search windows took {seconds:.2f} s here"
    return perplexity, seconds * every / count, basis


def _quickest(workspace: Workspace, count: int) -> tuple[float, float]:
    """FP32's perplexity on so many windows, and the least seconds that it took: a first time takes longer, by far."""
    model, part = workspace.model, workspace.splits.search.part(np.arange(count))
    took: list[float] = []
    while len(took) < _REPEATED and sum(took) < _PATIENCE_SECONDS:
        progress = slow("timing FP32", layer_calls(model, part))
        began = time.perf_counter()
        perplexity = evaluate(model, part, progress.step).perplexity
        took.append(time.perf_counter() - began)
        progress.close()
    return perplexity, min(took)


def _trial_seconds(spec: StudySpec, run: RunDirectory, say: Say) -> tuple[int, float | None] | None:
    """Finished trials of a run, and the mean seconds of one where there are some; None where there is no run."""
    if not exists(run):
        return None
    opened = opened_as_it_is(run, spec, say)
    trials = opened.patiently(lambda: opened.study.get_trials(deepcopy=False, states=FINISHED))
    opened.close()
    seconds = [held["seconds"] for trial in trials if "seconds" in (held := trial.user_attrs.get(MEASURED, {}))]
    return len(trials), float(np.mean(seconds)) if len(seconds) >= _STORED_FROM else None


def _probes(workspace: Workspace, run: RunDirectory) -> list[float]:
    """The probes that are still to be measured, each in evaluations: what comes before its layer is shared."""
    if workspace.spec.search.probe != "measured":
        return []
    units, config = workspace.space.units, workspace.checkpoint.config
    head = _head_share(workspace.space.components, config.vocabulary * config.d_model)
    costs = []
    for unit in units:
        layers = min(1.0, (config.n_layers - unit.stage + 1) / max(1, config.n_layers))
        costs += 2 * (len(unit.choices) - 1) * [_DIVERGENCE * head + (1 - head) * layers]
    done = len(run.read_lines(PROBES)) if run.path.exists() else 0
    return costs[min(done, len(costs)) :]


def _head_share(components: tuple[Component, ...], head: int) -> float:
    """The head's share of what a token costs, by multiplications."""
    layers = sum(component.count for component in components if component.layer is not None)
    return head / (head + layers)
