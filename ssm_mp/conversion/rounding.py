"""Every component of a model at the precisions below 8 bits, its rounding compensated.

Layer by layer, so that the moments of one layer are held at a time; what looks tokens up and scores them comes last.

Dimensions: `k` values in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_mp.components import Component
from ssm_mp.conversion.calibrate import FEW_TOKENS, Steps
from ssm_mp.conversion.moments import Gathered, end_moments, experts_of, in_parts, layer_moments
from ssm_mp.data import Windows
from ssm_mp.errors import InfeasibleError
from ssm_mp.files.shown import listed
from ssm_mp.model import LanguageModel
from ssm_mp.modules.parameter import held_by
from ssm_mp.precisions.compensate import DAMPINGS, Moment, chosen_damping
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored

Key = tuple[str, str]
"""Component and precision."""
Say = Callable[[str], None]

_FACTORS = 48
"""Bytes for each value of a moment while its factors are found, in float64."""
_BESIDE = 20
"""Bytes for each value of a component's moments while it is rounded: their sums, without those of experts that are
hardly reached, and their factors."""

_JUDGE = "nf2g128"
"""The narrowest precision, at which most is lost: by it damping is chosen, whatever precisions are asked for, so that a
study that gets more choices keeps the weights that it has measured."""


def compensable(precision: str) -> bool:
    """Whether rounding to a precision can be compensated: it has a book of levels."""
    return isinstance(get_precision(precision), Grouped)


def moment_bytes(components: Sequence[Component]) -> int:
    """Upper bound of what second moments of one layer's inputs take, and what rounding by the largest of them does."""
    layers: dict[int, int] = {}
    largest = 0
    for component in filter(_has_moment, components):
        k = next(p.shape[-1] for p in component.parameters if p.leaf == "weight")
        experts = experts_of(component)
        layers[component.stage] = layers.get(component.stage, 0) + 8 * k * k * experts
        largest = max(largest, (_FACTORS + _BESIDE * experts) * k * k)
    return max(layers.values(), default=0) + largest


@dataclass(frozen=True, eq=False)
class Rounded:
    """The weight of one component at some precisions."""

    component: str
    held: Mapping[str, Stored]


def rounded(
    model: LanguageModel,
    windows: Windows,
    components: Sequence[Component],
    precisions: Sequence[str],
    say: Say = lambda line: None,
    steps: Steps | None = None,
) -> Iterator[Rounded]:
    """The weights of `components` at those `precisions` that can be compensated.

    What a component cannot be is left out. `say` is told what had to be rounded to the nearest; steps: what there is to
    do. Raises EvaluationError where an input is not finite.
    """
    chosen = [name for name in precisions if compensable(name)]
    if not chosen:
        return
    for name, gathered in gathered_moments(model, windows, components, say, steps):
        weight = weight_of(model, name)
        damping = damping_of(weight, gathered)
        found = {precision: _rounded(weight, precision, gathered, damping) for precision in chosen}
        yield Rounded(name, {precision: stored for precision, stored in found.items() if stored is not None})


def gathered_moments(
    model: LanguageModel,
    windows: Windows,
    components: Sequence[Component],
    say: Say = lambda line: None,
    steps: Steps | None = None,
) -> Iterator[tuple[str, Gathered]]:
    """The moments to round each of `components` by that has some, layer after layer; arguments as of `rounded`."""
    wanted = {component.name for component in components if _has_moment(component)}
    parts = in_parts(windows.ids.to(model.device))
    told = (steps or (lambda what, count: lambda: None))("compensating rounding", len(model.layers) + 1)
    with torch.no_grad():
        states = [model.embed(ids) for ids in parts]
    _passed(model, model.embedding)
    for i, layer in enumerate(model.layers):
        yield from _each(model, layer_moments(model, i, states), wanted, say)
        _passed(model, layer)
        told()
    yield from _each(model, end_moments(model, states), wanted, say)
    for part in filter(None, (model.embedding, model.lm_head)):
        _passed(model, part)
    told()


def _passed(model: LanguageModel, part: nn.Module) -> None:
    if model.after_layer is not None:
        model.after_layer(part)


def _has_moment(component: Component) -> bool:
    return component.multiplies_inputs or component.kind == "embedding"


def _each(
    model: LanguageModel, moments: Mapping[str, Gathered], wanted: Container[str], say: Say
) -> Iterator[tuple[str, Gathered]]:
    """Moments of some components as they are used."""
    for name in filter(wanted.__contains__, moments):
        gathered, note = _usable(name, moments[name], weight_of(model, name).shape[-1])
        if note:
            say(f"note: {note}")
        yield name, gathered


def weight_of(model: LanguageModel, component: str) -> Tensor:
    """The weight of a component of an FP32 model, of any float type."""
    held = held_by(model.component(component), "weight")
    assert isinstance(held, FloatTensor)
    return held.value.data


def damping_of(weight: Tensor, gathered: Gathered) -> float:
    """How much moments are damped, by what is lost at the narrowest precision; the most where they say little."""
    judge = get_precision(_JUDGE)
    assert isinstance(judge, Grouped)
    if max(gathered.tokens) < weight.shape[-1]:
        return DAMPINGS[-1]
    try:
        return chosen_damping(weight, gathered.fit, gathered.held, judge.book, judge.group)
    except InfeasibleError:
        return DAMPINGS[-1]


def _rounded(weight: Tensor, precision: str, gathered: Gathered, damping: float) -> Stored | None:
    """A weight `[n, k]` at a precision; None where it cannot be held."""
    grouped = get_precision(precision)
    assert isinstance(grouped, Grouped)
    try:
        return grouped.compensated(weight, gathered.all, damping)
    except InfeasibleError:
        return None


def _usable(name: str, gathered: Gathered, k: int) -> tuple[Gathered, str]:
    """The moments to round by, zero of experts that hardly a token reached, and what is to be said of them."""
    few = [expert for expert, count in enumerate(gathered.tokens) if count < FEW_TOKENS]
    most = max(gathered.tokens)
    if not few:
        note = f"{name}: {most} calibration tokens for {k} inputs tell little: rounding hardly makes up for errors"
        return gathered, note if most < k else ""
    seen = torch.tensor([float(count >= FEW_TOKENS) for count in gathered.tokens])[:, None, None]
    fit, held = (Moment(one.second * seen.to(one.second.device)) for one in (gathered.fit, gathered.held))
    what = name if len(gathered.tokens) == 1 else f"{name}, experts {listed(list(map(str, few)), 6)}"
    note = f"{what}: reached by fewer than {FEW_TOKENS} calibration tokens, rounded to the nearest"
    return Gathered(fit, held, gathered.tokens), note
