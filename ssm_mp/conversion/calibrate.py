"""Activation statistics of one model: how large the inputs of each product are on the calibration windows.

Dimensions: `w` windows, `L` window length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Scan
from ssm_mp.components import find_components
from ssm_mp.data import Windows
from ssm_mp.errors import InfeasibleError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.precisions.quantize import histogram_scale
from ssm_mp.scheme import ScaleRule

_BINS = 2048
_BATCH = 8


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Magnitudes of the inputs of one component: the largest, and a histogram over `[0, largest]` (float64).

    tokens: how many reached it; of experts that are one component, how many reached each.
    """

    largest: float
    counts: Tensor
    tokens: tuple[int, ...] = ()

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


def calibrate(model: LanguageModel, windows: Windows) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every product of `model` on `windows`, in two passes: range, then histogram.

    The model is left as it is; the passes run on one that shares its modules.
    """
    observed_ones = [component for component in find_components(model) if component.multiplies_inputs]
    names = [component.name for component in observed_ones]
    largest = dict.fromkeys(names, 0.0)
    tokens = {c.name: [0] * (c.form.count if isinstance(c.form, ExpertsForm) else 1) for c in observed_ones}

    def see_range(name: str) -> Watcher:
        def see(x: Tensor, expert: int = 0) -> Tensor:
            tokens[name][expert] += x.numel() // x.shape[-1]
            if x.numel():
                largest[name] = max(largest[name], x.abs().max().item())
            return x

        return see

    _run(observed(model, {name: see_range(name) for name in names}), windows)
    counts = {name: torch.zeros(_BINS, dtype=torch.float64) for name in names}

    def see_histogram(name: str) -> Watcher:
        def see(x: Tensor, expert: int = 0) -> Tensor:
            if x.numel():
                found = torch.histc(x.abs().float(), bins=_BINS, min=0.0, max=max(largest[name], 1e-30))
                counts[name] += found.double().cpu()
            return x

        return see

    _run(observed(model, {name: see_histogram(name) for name in names}), windows)
    return {name: InputStatistics(largest[name], counts[name], tuple(tokens[name])) for name in names}


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


def _run(model: LanguageModel, windows: Windows) -> None:
    device = model.device
    with torch.inference_mode():
        for ids in windows.ids.split(_BATCH):
            for part in model.hidden(ids.to(device)).flatten(0, 1).split(model.head_tokens):
                model.head(part)
