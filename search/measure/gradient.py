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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from search.measure.probe import GRADIENT, Probe
from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.conversion.calibrate import Watcher, observed
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import FloatArray
from ssm_mp.model import LanguageModel, assemble, differentiable_scans
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.experts import ExpertsLinear
from ssm_mp.modules.inputs import InputQuantizer, rounded
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.stored import FloatTensor, Stored

_PASSES = 3
"""A backward pass costs two forward passes, and there is one of each."""


@dataclass(frozen=True)
class GradientEffect:
    """Estimated rise of log-perplexity over the component's FP32 value, nats a token, and its standard error over
    the windows. It is `first` (linear in the error, of either sign) + `curvature` (quadratic, never negative)."""

    log_increase: float
    log_stderr: float
    first: float
    curvature: float


@dataclass(frozen=True, eq=False)
class _Scores:
    """The scores s_w of the window under way by (component, precision), those of weights and of inputs apart."""

    weights: dict[tuple[str, str], float]
    inputs: dict[tuple[str, str], float]


def gradient_effects(
    workspace: Workspace, progress: Callable[[], None] | None = None, windows: Windows | None = None
) -> dict[str, dict[str, GradientEffect]]:
    """Component → precision → effect, for every free component and each of its choices.

    windows: what to take gradients on, by default all of `gradient_windows`.
    Window by window, so one window's activations and logits are held at a time and one tensor's gradient.
    progress: called after each window. Raises EvaluationError where an effect is not finite.
    """
    if not workspace.space.free:
        return {}
    windows = gradient_windows(workspace) if windows is None else windows
    scores = _Scores(defaultdict(float), defaultdict(float))
    model = _differentiable(workspace, scores)
    keys = [(c.name, precision) for c in workspace.space.free for precision in workspace.space.choices[c.name]]
    weights, inputs = (np.zeros((len(windows), len(keys))) for _ in range(2))
    device = workspace.model.device
    for w, ids in enumerate(windows.ids.to(device).split(1)):
        window_nll(model, ids).backward()
        weights[w] = [scores.weights.pop(key, 0.0) for key in keys]
        inputs[w] = [scores.inputs.pop(key, 0.0) for key in keys]
        if progress is not None:
            progress()
    effects: dict[str, dict[str, GradientEffect]] = defaultdict(dict)
    for k, (name, precision) in enumerate(keys):
        effects[name][precision] = _effect(weights[:, k], inputs[:, k], windows.predicted)
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


def window_nll(model: LanguageModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood of one window `ids [1, L]`, summed over its L − 1 predicted tokens, nats."""
    logits = model.scores(model.hidden(ids)[:, :-1])  # [1, L − 1, V]
    return F.cross_entropy(logits.flatten(0, 1), model.columns(ids[:, 1:]).flatten(), reduction="sum")


def _effect(weights: FloatArray, inputs: FloatArray, predicted: int) -> GradientEffect:
    """One effect from its scores `[w]` of weights and of inputs, `predicted` tokens a window."""
    first = (weights + inputs) / predicted
    curvature = 0.5 * (weights**2 + inputs**2) / predicted
    n = first.size
    stderr = float((first + curvature).std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return GradientEffect(float((first + curvature).mean()), stderr, float(first.mean()), float(curvature.mean()))


def _differentiable(workspace: Workspace, scores: _Scores) -> LanguageModel:
    """The FP32 model over again, sharing its tensors' memory; `backward` adds to the scores and leaves no gradient."""
    model, space = workspace.model, workspace.space
    free = {component.name for component in space.free}
    modules: dict[str, nn.Module] = {}
    watchers: dict[str, Watcher] = {}
    for component in space.components:
        source = model.component(component.name)
        if component.name not in free:
            modules[component.name] = source
            continue
        modules[component.name] = _weighed(workspace, component, source, scores)
        quantizers = _input_quantizers(workspace, component)
        if quantizers:
            watchers[component.name] = _watcher(component.name, quantizers, scores)
    scans = differentiable_scans(model.config)
    return observed(assemble(model.config, modules, scans), watchers, scans)


def _weighed(workspace: Workspace, component: Component, source: nn.Module, scores: _Scores) -> nn.Module:
    """A free component's module whose gradients are multiplied with each precision's error and let go."""
    tensors: dict[str, Stored] = {}
    for parameter in component.parameters:
        held = _stored(source, parameter.leaf)
        if isinstance(held, FloatTensor):
            held = FloatTensor(held.value.data)
            held.value.requires_grad_()
            held.value.register_post_accumulate_grad_hook(_weigher(workspace, component, parameter.leaf, scores))
        tensors[parameter.leaf] = held
    return component.form.module(tensors, None)


def _stored(module: nn.Module, leaf: str) -> Stored:
    held = module if isinstance(module, Stored) else getattr(module, leaf)
    assert isinstance(held, Stored)
    return held


def _weigher(workspace: Workspace, component: Component, leaf: str, scores: _Scores) -> Callable[[Tensor], None]:
    """Adds ∇_W L_w · dW of one tensor to its component's score at each precision."""
    precisions = workspace.space.choices[component.name]
    held = {p: _stored(workspace.converter.module(component, p), leaf) for p in precisions}

    def weigh(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, value = parameter.grad.flatten(), parameter.detach()
        for precision, quantized in held.items():
            # unpacked anew every time: all errors together would take the model's memory several times over
            error = (quantized.tensor() - value).flatten()
            scores.weights[component.name, precision] += torch.dot(gradient, error).item()
        parameter.grad = None

    return weigh


def _input_quantizers(workspace: Workspace, component: Component) -> dict[str, InputQuantizer]:
    """The quantisers of a component's inputs, by those of its precisions that have one."""
    found: dict[str, InputQuantizer] = {}
    for precision in workspace.space.choices[component.name]:
        module = workspace.converter.module(component, precision)
        quantizer = module.input_quantizer if isinstance(module, Linear | Embedding | ExpertsLinear) else None
        if quantizer is not None:
            found[precision] = quantizer
    return found


def _watcher(name: str, quantizers: dict[str, InputQuantizer], scores: _Scores) -> Watcher:
    """Adds ∇_x L_w · dx of one product, summed over tokens, to its component's score."""

    def watch(x: Tensor, *expert: int) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        # a tensor of this product's own: its gradient leaves out what else is done with x
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        flat = x.detach().reshape(-1, x.shape[-1])  # [m, k]

        def weigh(gradient: Tensor) -> None:
            for precision, quantizer in quantizers.items():
                error = (rounded(quantizer, flat) - flat).flatten()
                scores.inputs[name, precision] += torch.dot(gradient.flatten(), error).item()

        own.register_hook(weigh)
        return own

    return watch


def gradient_probes(workspace: Workspace, progress: Callable[[], None] | None = None) -> list[Probe]:
    """The same effects as probes, each over its component's widest choice."""
    found = []
    for name, held in gradient_effects(workspace, progress).items():
        top = workspace.space.choices[name][0]
        for precision, effect in held.items():
            if precision != top:
                increase = effect.log_increase - held[top].log_increase
                found.append(Probe(name, precision, GRADIENT, top, increase, effect.log_stderr, None))
    return found
