"""Activation statistics of one model: how large the inputs of each product are on the calibration windows.

Dimensions: `w` windows, `L` window length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Scan
from ssm_mp.components import Component, find_components
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError, InfeasibleError
from ssm_mp.kernels import calls
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.parallel import in_parallel
from ssm_mp.precisions.quantize import histogram_scale, powers_of_two
from ssm_mp.scheme import ScaleRule
from ssm_mp.shards import shards

_BINS = 2048
_FINE_BINS = 1 << 15
"""Bins that inputs are counted in before their range is known."""
_LEAST_EXPONENT = -60
"""Inputs below 2^−60 need no bins of their own: no float16 scale is so small."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Magnitudes of the inputs of one component: the largest, and a histogram over `[0, largest]` (float64).

    tokens: how many reached it; of experts that are one component, how many reached each.
    exponent: of the powers of two that inputs were divided by before they were counted, int8 `[k]`; None: none was.
    """

    largest: float
    counts: Tensor
    tokens: tuple[int, ...] = ()
    exponent: Tensor | None = None

    def scale(self, rule: ScaleRule) -> Tensor:
        """Static input scale, float16 `[1]`. Raises InfeasibleError where nothing ever reached the component."""
        if self.counts.sum() == 0:
            raise InfeasibleError("no calibration token reached it, so the range of its inputs is unknown")
        return histogram_scale(self.counts, self.largest, rule)


Statistics = Mapping[str, InputStatistics]
"""Component name → statistics of its inputs, for every component that multiplies inputs."""


Watcher = Callable[..., Tensor]
"""Sees the inputs `[..., k]` of a product, and the expert's number where experts are one component; what it returns,
the same values, is what is multiplied."""


Steps = Callable[[str, int], Callable[[], None]]
"""Begins a stage of so many steps; what it returns is called after each of them."""


class _Observed(nn.Module):
    """Passes inputs on to a component's module by way of `see`."""

    def __init__(self, inner: nn.Module, see: Watcher) -> None:
        super().__init__()
        self.inner = inner
        self.see = see

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        """expert: its number, where experts are one component."""
        out: Tensor = self.inner(self.see(x, *expert), *expert)
        return out


class _ObservedHead(_Observed):
    """An embedding whose tied head is observed; the lookup multiplies nothing."""

    def __init__(self, inner: nn.Module, see: Watcher) -> None:
        super().__init__(inner, see)
        self.block_of = inner.block_of

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        out: Tensor = self.inner(x)
        return out

    def project(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner.project(self.see(x))  # type: ignore[operator]  # nn.Module attributes are untyped
        return out


class _Magnitudes:
    """Magnitudes of the inputs of one component as they come, from several threads.

    Bins cover `[0, 2^exponent)`; where an input is larger, neighbours are merged until they reach it. So the counts
    are the same in whatever order inputs come.
    """

    def __init__(self, component: Component, exponent: Tensor | None = None) -> None:
        self._name = component.name
        self._of_inputs = exponent
        self._factors = None if exponent is None else powers_of_two(-exponent)
        self._lock = Lock()
        self._exponent = _LEAST_EXPONENT
        self._counts = torch.zeros(_FINE_BINS, dtype=torch.int64)
        self._largest = 0.0
        self._tokens = [0] * _experts(component)

    def see(self, x: Tensor, expert: int = 0) -> Tensor:
        """A `Watcher`. Raises EvaluationError where an input is not finite."""
        if not x.numel():
            return x
        scaled = x if self._factors is None else x * self._factors.to(x.device)
        low, high = scaled.aminmax()
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            raise EvaluationError(
                f"an input of {self._name} is {largest} on the calibration windows: no range can be taken from them"
            )
        with self._lock:
            self._tokens[expert] += x.numel() // x.shape[-1]
            self._largest = max(self._largest, largest)
            self._widen(math.frexp(largest)[1] if largest else _LEAST_EXPONENT)
            count_magnitudes(scaled, _FINE_BINS * 2.0**-self._exponent, self._counts)
        return x

    def _widen(self, exponent: int) -> None:
        """Cover `[0, 2^exponent)`, if it is more than before."""
        shift = min(exponent - self._exponent, _FINE_BINS.bit_length() - 1)
        if shift > 0:
            merged = self._counts.view(-1, 1 << shift).sum(dim=1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[: merged.numel()] = merged
            self._exponent = exponent

    def statistics(self) -> InputStatistics:
        """What was seen, in equal bins over `[0, largest]`; what one of ours counts lies evenly within it."""
        if self._largest == 0:
            counts = torch.zeros(_BINS, dtype=torch.float64)
            counts[0] = self._counts.sum()
            return InputStatistics(0.0, counts, tuple(self._tokens), self._of_inputs)
        edges = np.arange(_FINE_BINS + 1) * (2.0**self._exponent / _FINE_BINS)
        used = int(np.searchsorted(edges, self._largest)) + 1
        below = np.concatenate([[0], self._counts.numpy().cumsum()])
        ours = np.minimum(edges[:used], self._largest)
        at = np.interp(np.linspace(0.0, self._largest, _BINS + 1), ours, below[:used])
        # a value in the last bin of all lies below the largest
        at[-1] = below[-1]
        return InputStatistics(self._largest, torch.from_numpy(np.diff(at)), tuple(self._tokens), self._of_inputs)


def count_magnitudes(x: Tensor, factor: float, counts: Tensor) -> None:
    """Add to `counts [bins]`, int64, how many magnitudes of `x` times `factor` are in `[i, i + 1)`."""
    if calls.usable(x):
        calls.count_magnitudes(x, factor, counts)
    else:
        counts += count_magnitudes_reference(x, factor, counts.numel())


def count_magnitudes_reference(x: Tensor, factor: float, bins: int) -> Tensor:
    """What `count_magnitudes` adds, int64 `[bins]`, on the CPU."""
    found = (x.float().abs() * factor).long().clamp_(max=bins - 1)
    return torch.bincount(found.flatten(), minlength=bins).cpu()


def calibrate(
    model: LanguageModel,
    windows: Windows,
    steps: Steps | None = None,
    exponents: Mapping[str, Tensor] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every product of `model` on `windows`, in one pass in which no logit is computed.

    steps: told what there is to do. The model is left as it is; the pass runs on one that shares its
    modules, layer by layer where the model asks for it (`after_layer`). Raises EvaluationError where an input is not
    finite. exponents: by component, of the powers of two that its inputs are divided by first, int8 `[k]`.
    """
    components = [component for component in find_components(model) if component.multiplies_inputs]
    scaled = dict(exponents or {})
    seen = {component.name: _Magnitudes(component, scaled.get(component.name)) for component in components}
    heads = [c.name for c in components if c.kind == "embedding" or c.name == "lm_head"]
    watchers: dict[str, Watcher] = {name: one.see for name, one in seen.items() if name not in heads}

    def see_head(hidden: Tensor) -> None:
        x = model.final(hidden)
        for name in heads:
            seen[name].see(x)

    _run(observed(model, watchers), windows, see_head, steps or (lambda what, count: lambda: None))
    return {name: one.statistics() for name, one in seen.items()}


def calibrate_reference(model: LanguageModel, windows: Windows) -> dict[str, InputStatistics]:
    """What `calibrate` finds, in two passes over the whole model, the range being known in the second."""
    components = [component for component in find_components(model) if component.multiplies_inputs]
    largest = {component.name: 0.0 for component in components}
    tokens = {component.name: [0] * _experts(component) for component in components}
    counts = {component.name: torch.zeros(_BINS, dtype=torch.float64) for component in components}

    def see_range(name: str) -> Watcher:
        def see(x: Tensor, expert: int = 0) -> Tensor:
            tokens[name][expert] += x.numel() // x.shape[-1]
            largest[name] = max(largest[name], x.abs().max().item() if x.numel() else 0.0)
            return x

        return see

    def see_histogram(name: str) -> Watcher:
        def see(x: Tensor, expert: int = 0) -> Tensor:
            found = torch.histc(x.abs().float(), bins=_BINS, min=0.0, max=max(largest[name], 1e-30))
            counts[name].add_(found.double().cpu())
            return x

        return see

    for see in (see_range, see_histogram):
        watched = observed(model, {name: see(name) for name in largest})
        with torch.inference_mode():
            for ids in windows.ids.to(model.device).split(8):
                watched(ids)
    return {name: InputStatistics(largest[name], counts[name], tuple(tokens[name])) for name in largest}


def _experts(component: Component) -> int:
    return component.form.count if isinstance(component.form, ExpertsForm) else 1


def _run(
    model: LanguageModel,
    windows: Windows,
    see_head: Callable[[Tensor], None],
    steps: Steps,
) -> None:
    """All windows through the model; `see_head` gets their last hidden states."""
    states = list(shards(windows.ids.to(model.device), model.config))
    lock, told = Lock(), steps("calibrating", len(states) * (1 if model.after_layer is None else len(model.layers)))

    def through(ids: Tensor) -> None:
        see_head(model.hidden(ids))
        with lock:
            told()

    if model.after_layer is None:
        in_parallel(through, states)
        return

    def onward(step: tuple[nn.Module, int]) -> None:
        layer, s = step
        states[s] = layer(states[s])
        with lock:
            told()

    everyone = range(len(states))
    states[:] = in_parallel(model.embed, states)
    model.after_layer(model.embedding)
    for layer in model.layers:
        in_parallel(onward, [(layer, s) for s in everyone])
        model.after_layer(layer)
    in_parallel(see_head, states)


FEW_TOKENS = 64
"""Tokens of calibration below which an expert's range is hardly known."""


def hardly_reached(statistics: Statistics) -> list[str]:
    """Experts that calibration hardly reached, with how many tokens did: one line each, the fewest first."""
    most = max((sum(one.tokens) for one in statistics.values()), default=0)
    found: dict[str, int] = {}
    for name, one in statistics.items():
        at = name.rsplit(".", 1)[0]  # an expert's projections see the same tokens
        for e, count in enumerate(one.tokens):
            if count < min(FEW_TOKENS, most):
                expert = at if len(one.tokens) == 1 else f"{at}.{e}"
                found[expert] = min(count, found.get(expert, count))
    return [f"{expert}: {count} tokens" for expert, count in sorted(found.items(), key=lambda pair: pair[1])]


def observed(
    model: LanguageModel, watchers: Mapping[str, Watcher], scans: Mapping[str, Scan] | None = None
) -> LanguageModel:
    """A model of the same modules whose products' inputs go by way of the watchers, by component name.

    scans: as in `assemble`.
    """
    modules: dict[str, nn.Module] = {}
    for component in find_components(model):
        inner = model.component(component.name)
        if component.name not in watchers:
            modules[component.name] = inner
        else:
            wrapper = _ObservedHead if component.kind == "embedding" else _Observed
            modules[component.name] = wrapper(inner, watchers[component.name])
    return assemble(model.config, modules, scans, model.after_layer)
