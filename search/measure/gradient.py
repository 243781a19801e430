"""Sensitivity of each component to each precision from gradients alone: one backward pass, no map evaluated.

Quantisation turns a component's weights W into W + dW and, where int8 multiplies integers, its inputs x into
x + dx. With s_w = ∇_W L_w · dW, L_w the negative log-likelihood of window w (T predicted tokens), Taylor's formula
gives the rise of the mean log-perplexity, in nats a token,

    mean_w s_w / T  +  ½ dWᵀ H dW / T,    H = the mean of ∇² L_w ≈ E[∇L_w ∇L_wᵀ],    dWᵀ H dW ≈ mean_w s_w².

The Hessian of a whole window's L_w is its Fisher information where the model fits the text, and that is the
expected outer product of the window's score; windows are independent, so their mean estimates it. Both terms are
of a window and become a token's by the same 1/T. The inputs' error adds the same two terms of its own,
s_w = Σ_tokens ∇_x L_w · dx; that it is independent of dW drops the mixed term.

Sources: LeCun et al. 1990 "Optimal Brain Damage" and Hassibi & Stork 1993 "Optimal Brain Surgeon" (the expansion),
Kirkpatrick et al. 2017 (Fisher information for the Hessian), Zandonati et al. 2022 "FIT: A Metric for Model
Sensitivity" (of quantised weights and activations).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from search.base.metric import Word
from search.measure.backward import Scores, chunk_windows, joined, keys_of, layer_by_layer
from search.measure.probe import GRADIENT, Probe
from search.problem.workspace import Workspace
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import FloatArray

_PASSES = 3
"""A backward pass costs two forward passes, and there is one of each."""


@dataclass(frozen=True)
class GradientEffect:
    """Estimated rise of log-perplexity over the component's FP32 value, nats a token, and its standard error over
    the windows. It is `first` (linear in the error, of either sign) + `curvature` (quadratic, never negative). The
    divergence from FP32 is least there, so that `first` is no part of it, and its second derivative is that very H."""

    log_increase: float
    log_stderr: float
    first: float
    curvature: float


def gradient_effects(
    workspace: Workspace, progress: Callable[[], None] | None = None, windows: Windows | None = None
) -> dict[str, dict[str, GradientEffect]]:
    """Component → precision → effect, for every free component and each of its choices.

    windows: what to take gradients on, by default all of `gradient_windows`.
    progress: called after each window. Raises EvaluationError where an effect is not finite.
    """
    if not workspace.space.free:
        return {}
    windows = gradient_windows(workspace) if windows is None else windows
    found = []
    for part in windows.ids.split(chunk_windows(workspace)):
        found.append(layer_by_layer(workspace, Windows(part)))
        if progress is not None:
            for _ in part:
                progress()
    return effects_of(workspace, joined(found), windows.predicted)


def effects_of(workspace: Workspace, scores: Scores, predicted: int) -> dict[str, dict[str, GradientEffect]]:
    """The effects of scores of windows that predict so many tokens. Raises EvaluationError where one is not finite."""
    effects: dict[str, dict[str, GradientEffect]] = defaultdict(dict)
    for k, (name, precision) in enumerate(keys_of(workspace)):
        scored = scores.weights[:, k], scores.inputs[:, k]
        effects[name][precision] = _effect(*scored, predicted, workspace.spec.search.metric)
        if not math.isfinite(effects[name][precision].log_increase):
            raise EvaluationError(f"the gradient of {name} at {precision} is not finite on the calibration windows")
    return dict(effects)


def gradient_evaluations(workspace: Workspace) -> float:
    """What `gradient_effects` costs, counted in evaluations of all search windows: a backward pass as two forward.

    On the clock it is several times that where a model is so small that the scan's Python loop dominates.
    """
    return _PASSES * len(gradient_windows(workspace)) / len(workspace.splits.search)


def gradient_windows(workspace: Workspace) -> Windows:
    """The calibration windows; where they are made up, and no text to have a likelihood of, the search windows."""
    splits = workspace.splits
    return splits.calibration if workspace.spec.data.calibration == "text" else splits.search


def _effect(weights: FloatArray, inputs: FloatArray, predicted: int, metric: Word = "perplexity") -> GradientEffect:
    """One effect from its scores `[w]` of weights and of inputs, `predicted` tokens a window."""
    first = (weights + inputs) / predicted if metric == "perplexity" else np.zeros_like(weights)
    curvature = 0.5 * (weights**2 + inputs**2) / predicted
    n = first.size
    stderr = float((first + curvature).std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return GradientEffect(float((first + curvature).mean()), stderr, float(first.mean()), float(curvature.mean()))


def gradient_probes(workspace: Workspace, effects: Mapping[str, Mapping[str, GradientEffect]]) -> list[Probe]:
    """The effects as probes, each over its component's widest choice."""
    found = []
    for name, held in effects.items():
        top = workspace.space.choices[name][0]
        for precision, effect in held.items():
            if precision != top:
                increase = effect.log_increase - held[top].log_increase
                found.append(Probe(name, precision, GRADIENT, top, increase, effect.log_stderr, None))
    return found
