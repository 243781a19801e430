"""Second moments of the inputs of a model's products, by which rounding is compensated (`precisions/compensate.py`).

Of a projection they are those of its inputs in the FP32 model. An embedding is two matrices: of a tied head its rows
count by the head's inputs, half of all tokens alike and half of each by how open the question is whether the next token
is one of the rows, Σ p(1 − p); of the lookup evenly.

Every fourth part of the windows is held out: its moments are kept apart, to choose by them how much the others are
damped.

Dimensions: `w` windows, `L` window length, `m` tokens, `k` inputs of a product, `r` experts, or 1, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_mp.components import Component, find_components
from ssm_mp.errors import EvaluationError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.precisions.compensate import Moment

HELD = 4
"""Of so many parts of the windows one is held out."""
_PARTS, _TOKENS = 8, 2048
"""The windows come in so many parts at least, if there are as many, of so many tokens at most, if a window is shorter.
"""
_EVEN = 0.5
"""How much an embedding's lookup counts beside its head."""
_OPEN_TOKENS = 8192
"""Tokens of which is asked how open their questions are: the whole vocabulary is scored for it."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Moments of one component's inputs, of most windows (`fit`) and of those `held` out, and how many tokens reached
    each expert, or all of them."""

    fit: Moment
    held: Moment
    tokens: tuple[int, ...]

    @property
    def all(self) -> Moment:
        """Of all windows."""
        return Moment(self.fit.second + self.held.second)


def in_parts(ids: Tensor) -> list[Tensor]:
    """Windows `[w, L]` in the parts that moments are gathered in."""
    most = max(1, _TOKENS // ids.shape[1])
    return list(ids.split(max(1, min(most, len(ids) // _PARTS))))


def experts_of(component: Component) -> int:
    """How many experts are one component; 1 where it is no such."""
    return component.form.count if isinstance(component.form, ExpertsForm) else 1


class _Sums:
    """Σ x xᵀ of one component, of the windows to fit and of those held out: float32 `[2, r, k, k]`."""

    def __init__(self, parts: int, k: int, device: torch.device) -> None:
        self.second = torch.zeros(2, parts, k, k, device=device)
        self.tokens = [0] * parts

    def add(self, held: bool, part: int, x: Tensor) -> None:
        """Inputs `x [m, k]`."""
        self.second[int(held), part] += x.T @ x
        self.tokens[part] += x.shape[0]

    def gathered(self, name: str) -> Gathered:
        """Raises EvaluationError where an input was not finite."""
        if not bool(self.second.isfinite().all()):
            raise EvaluationError(f"an input of {name} is not finite on the calibration windows: it has no moments")
        return Gathered(Moment(self.second[0]), Moment(self.second[1]), tuple(self.tokens))


class _Watched(nn.Module):
    """A product that tells its inputs."""

    def __init__(self, inner: nn.Module, see: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.inner, self.see = inner, see

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        """expert: its number, where experts are one component."""
        self.see(expert[0] if expert else 0, x.detach().reshape(-1, x.shape[-1]).float())
        out: Tensor = self.inner(x, *expert)
        return out


def layer_moments(model: LanguageModel, layer: int, states: list[Tensor]) -> dict[str, Gathered]:
    """Moments of each product of a layer, whose inputs are the hidden `states` of each part: its outputs are then in
    their place. Raises EvaluationError where an input is not finite."""
    components = [c for c in find_components(model) if c.stage == layer + 1 and c.multiplies_inputs]
    sums = {c.name: _Sums(experts_of(c), _inputs(c), model.device) for c in components}
    modules = {c.name: model.component(c.name) for c in find_components(model)}
    held = False
    for name, one in sums.items():

        def see(expert: int, x: Tensor, one: _Sums = one) -> None:
            one.add(held, expert, x)

        modules[name] = _Watched(modules[name], see)
    watched = assemble(model.config, modules).layers[layer]
    with torch.no_grad():
        for s, state in enumerate(states):
            held = s % HELD == HELD - 1
            states[s] = watched(state)
    return {name: one.gathered(name) for name, one in sums.items()}


def _inputs(component: Component) -> int:
    """Values in a row of its weight."""
    return next(p.shape[-1] for p in component.parameters if p.leaf == "weight")


def end_moments(model: LanguageModel, hidden: Sequence[Tensor]) -> dict[str, Gathered]:
    """Moments of the token embedding, or of each block of it, and of the head, from last hidden states `[w, L, d]`.

    Raises EvaluationError where an input of the head is not finite.
    """
    endings = [c for c in find_components(model) if c.kind == "embedding" or c.name == "lm_head"]
    d, device = model.config.d_model, model.device
    sums, tied = _Sums(1, d, device), model.lm_head is None
    with torch.no_grad():
        for s, state in enumerate(hidden):
            sums.add(s % HELD == HELD - 1, 0, _head_inputs(model, state))
        opened = _opened(model, hidden, [c.parameters[0].shape[0] for c in endings]) if tied else []
    head = sums.gathered("the head")
    even = torch.eye(d, device=device)[None] * (_EVEN / d)
    found: dict[str, Gathered] = {}
    for c, component in enumerate(endings):
        if component.name == "lm_head":
            found[component.name] = head
        elif tied:
            found[component.name] = _both(head, _scaled(opened[c]), even)
        else:
            found[component.name] = Gathered(Moment(even), Moment(torch.zeros_like(even)), head.tokens)
    return found


def _both(head: Gathered, opened: Tensor, even: Tensor) -> Gathered:
    """Moments of a tied embedding, from those of the head; nothing is held out where nothing was of the head's."""
    held_out = bool(head.held.second.any())
    fit, held = (Moment((_scaled(one.second) + opened) / 2 + even) for one in (head.fit, head.held))
    return Gathered(fit, held if held_out else Moment(torch.zeros_like(even)), head.tokens)


def _opened(model: LanguageModel, hidden: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """The head's inputs of some tokens, each weighted by how open it is whether one of a component's tokens is next:
    `[1, d, d]` for each component of so many rows of the tied head."""
    d = model.config.d_model
    found = [torch.zeros(1, d, d, device=model.device) for _ in rows]
    tokens = torch.cat([state[:, :-1].flatten(0, 1)[:_OPEN_TOKENS] for state in hidden])[:_OPEN_TOKENS]  # [m, d]
    for part in tokens.split(model.head_tokens):
        inputs = model.final(part).float()
        chances = model.scores(part).softmax(dim=-1)  # [m, V]
        for sums, one in zip(found, (chances * (1 - chances)).split(list(rows), dim=-1), strict=True):
            sums[0] += inputs.T @ (inputs * one.sum(dim=-1, keepdim=True))
    return found


def _head_inputs(model: LanguageModel, hidden: Tensor) -> Tensor:
    """What the head multiplies to predict: `[m, d]`, of all tokens but the last of each window."""
    return model.final(hidden[:, :-1]).flatten(0, 1).float()


def _scaled(second: Tensor) -> Tensor:
    """A moment of trace 1; zero where it is."""
    trace = float(second.diagonal(dim1=1, dim2=2).sum())
    return second / trace if trace > 0 else second
