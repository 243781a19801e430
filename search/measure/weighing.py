"""Modules whose backward pass multiplies the gradients of weights and inputs with quantisation errors, and keeps none.

Each adds to the tallies of the windows that are being run: by autograd's own gradients in a batch of one window, or, in
batches of several, out of a product's inputs and its outputs' gradients.

Dimensions: `b` windows run at once, `L` window length, `d` model, `n` outputs and `i` inputs of a product, `m` tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.conversion.calibrate import Watcher, observed
from ssm_mp.model import LanguageModel, assemble, differentiable_scans
from ssm_mp.modules.convolution import DepthwiseConv, convolved
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.experts import ExpertsLinear
from ssm_mp.modules.inputs import InputQuantizer, rounded
from ssm_mp.modules.linear import Linear
from ssm_mp.modules.parameter import held_by
from ssm_mp.precisions.stored import FloatTensor, Stored

Key = tuple[str, str]
"""Component and precision."""

_ERRORS = 1 << 28
"""Bytes at most of the unpacked errors of a layer."""

How = Literal["graph", "products", "lookup"]
"""How a stage's gradients are found: by autograd; without it, where all free components are products and convolutions;
or from the rows alone that an embedding looks up."""


@dataclass(frozen=True, eq=False)
class Tally:
    """The scores of one window, those of weights and of inputs apart."""

    weights: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    inputs: dict[Key, float] = field(default_factory=lambda: defaultdict(float))


Batch = list[Tally]
"""Of the windows that are being run at once, in their order."""


def differentiable(
    workspace: Workspace, batch: Batch, names: Collection[str] | None = None, how: How = "graph"
) -> LanguageModel:
    """The FP32 model over again; `backward` adds to the tallies of the batch and leaves no gradient.

    names: the free components that are differentiated, None: all of them. Their weights are float32, and share the
    model's memory where its own are; all other modules are the model's.
    """
    model, space = workspace.model, workspace.space
    chosen = {component.name for component in space.free if names is None or component.name in names}
    modules: dict[str, nn.Module] = {}
    watchers: dict[str, Watcher] = {}
    errors = _Errors(workspace, [component for component in space.free if component.name in chosen])
    for component in space.components:
        source = model.component(component.name)
        if component.name not in chosen:
            modules[component.name] = source
            continue
        if how == "lookup" and isinstance(source, Embedding):
            modules[component.name] = _Lookup(component, source, forms_of(workspace, component), batch)
            continue
        if how != "products":
            modules[component.name] = _weighed(component, source, errors, batch)
        elif isinstance(source, DepthwiseConv):
            modules[component.name] = _Convolution(component, source, errors, batch)
        else:
            modules[component.name] = _Product(component, source, errors, batch)
        quantizers = _input_quantizers(workspace, component)
        if quantizers:
            watchers[component.name] = _watcher(component.name, quantizers, batch)
    scans = differentiable_scans(model.config)
    return observed(assemble(model.config, modules, scans), watchers, scans)


def forms_of(workspace: Workspace, component: Component) -> dict[str, nn.Module]:
    """A component at each of its choices."""
    choices = workspace.space.choices[component.name]
    return {precision: workspace.converter.module(component, precision) for precision in choices}


class _Errors:
    """Quantisation errors dW of some components; they stay unpacked where all together are few enough bytes."""

    def __init__(self, workspace: Workspace, components: Sequence[Component]) -> None:
        self._workspace = workspace
        floats = sum(c.count * len(workspace.space.choices[c.name]) for c in components)
        self._kept: dict[tuple[str, str], Tensor] | None = {} if 4 * floats <= _ERRORS else None

    def choices(self, component: Component) -> Sequence[str]:
        """A component's precisions."""
        return self._workspace.space.choices[component.name]

    def dots(self, component: Component, leaf: str, value: Tensor, gradient: Tensor) -> list[float]:
        """∇ · dW for each of a component's choices, where `value` is W."""
        key, flat = (component.name, leaf), gradient.flatten()
        kept = None if self._kept is None else self._kept.get(key)
        if kept is None:
            modules = (self._workspace.converter.module(component, precision) for precision in self.choices(component))
            errors = (_error(held_by(module, leaf), value) for module in modules)
            if self._kept is None:
                return [torch.dot(flat, error).item() for error in errors]
            kept = self._kept[key] = torch.stack(list(errors))
        found: list[float] = torch.mv(kept, flat).tolist()
        return found


def _error(quantized: Stored, value: Tensor) -> Tensor:
    return (quantized.tensor() - value).flatten()


def _weighed(component: Component, source: nn.Module, errors: _Errors, batch: Batch) -> nn.Module:
    """A free component's module whose gradients are multiplied with each precision's error and let go."""
    tensors: dict[str, Stored] = {}
    for parameter in component.parameters:
        held = held_by(source, parameter.leaf)
        if isinstance(held, FloatTensor):
            held = FloatTensor(held.value.data.float())
            held.value.requires_grad_()
            held.value.register_post_accumulate_grad_hook(_weigher(component, parameter.leaf, errors, batch))
        tensors[parameter.leaf] = held
    return component.form.module(tensors, None)


class _Lookup(nn.Module):
    """An embedding's rows, in a batch of one window: no gradient is as large as the whole of it."""

    def __init__(self, component: Component, source: Embedding, forms: Mapping[str, nn.Module], batch: Batch) -> None:
        super().__init__()
        self.block_of = source.block_of
        self._name, self._weight, self._batch = component.name, source.weight, batch
        self._forms = {precision: held_by(form, "weight") for precision, form in forms.items()}

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[…]` → `[…, d]`."""
        rows = self._weight.rows(ids).detach().requires_grad_()

        def weigh(gradient: Tensor) -> None:
            for precision, held in self._forms.items():
                error = held.rows(ids) - rows.detach()
                self._batch[0].weights[self._name, precision] += (gradient * error).sum().item()

        rows.register_hook(weigh)
        return rows


class _Weighed(nn.Module):
    """A free component run for several windows at once, whose weights' gradients are multiplied likewise."""

    def __init__(self, component: Component, source: nn.Module, errors: _Errors, batch: Batch) -> None:
        super().__init__()
        self._component, self._errors, self._batch = component, errors, batch
        held = {parameter.leaf: held_by(source, parameter.leaf) for parameter in component.parameters}
        self._held = {leaf: FloatTensor(h.value.data.float()) for leaf, h in held.items() if isinstance(h, FloatTensor)}
        self._inner = component.form.module(self._held, None)

    def _add(self, tally: Tally, leaf: str, gradient: Tensor) -> None:
        """Add one window's ∇_W L_w · dW of one tensor."""
        found = self._errors.dots(self._component, leaf, self._held[leaf].value.detach(), gradient)
        for precision, score in zip(self._errors.choices(self._component), found, strict=True):
            tally.weights[self._component.name, precision] += score


class _Product(_Weighed):
    """A product; its weights are shared by the windows."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, …, i]` → `[b, …, n]`."""
        out: Tensor = self._inner(x)
        if not out.requires_grad:
            return out
        seen = x.detach().reshape(len(self._batch), -1, x.shape[-1])

        def weigh(gradient: Tensor) -> None:
            of_windows = gradient.reshape(len(self._batch), -1, gradient.shape[-1])
            for tally, inputs, outputs in zip(self._batch, seen, of_windows, strict=True):
                for leaf in self._held:
                    self._add(tally, leaf, outputs.T @ inputs if leaf == "weight" else outputs.sum(dim=0))

        out.register_hook(weigh)
        return out


class _Convolution(_Weighed):
    """A convolution; each window has weights of its own."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `DepthwiseConv.forward`, from the beginning of each window."""
        assert before is None
        assert isinstance(self._inner, DepthwiseConv)
        own = {leaf: self._own(leaf) for leaf in self._held}
        weight = own["weight"][:, :, 0].mT[:, :, None]  # [b, K, 1, I]
        bias = own["bias"][:, None] if "bias" in own else None
        padding = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
        y = convolved(x, weight, bias, padding)
        return F.silu(y) if self._inner.activation else y, padding

    def _own(self, leaf: str) -> Tensor:
        """A tensor for each window, whose gradients are weighed: `[b, …]`."""
        value = self._held[leaf].value.detach()
        own = value.expand(len(self._batch), *value.shape).requires_grad_()

        def weigh(gradient: Tensor) -> None:
            for tally, of_window in zip(self._batch, gradient, strict=True):
                self._add(tally, leaf, of_window)

        own.register_hook(weigh)
        return own


def _weigher(component: Component, leaf: str, errors: _Errors, batch: Batch) -> Callable[[Tensor], None]:
    """Adds ∇_W L_w · dW of one tensor to its component's score at each precision, in a batch of one window."""

    def weigh(parameter: Tensor) -> None:
        assert parameter.grad is not None
        found = errors.dots(component, leaf, parameter.detach(), parameter.grad)
        for precision, score in zip(errors.choices(component), found, strict=True):
            batch[0].weights[component.name, precision] += score
        parameter.grad = None

    return weigh


def _input_quantizers(workspace: Workspace, component: Component) -> dict[str, InputQuantizer]:
    """The quantisers of a component's inputs, by those of its precisions that have one."""
    found: dict[str, InputQuantizer] = {}
    for precision, module in forms_of(workspace, component).items():
        quantizer = module.input_quantizer if isinstance(module, Linear | Embedding | ExpertsLinear) else None
        if quantizer is not None:
            found[precision] = quantizer
    return found


def _watcher(name: str, quantizers: dict[str, InputQuantizer], batch: Batch) -> Watcher:
    """Adds ∇_x L_w · dx of one product, summed over tokens, to its component's score."""

    def watch(x: Tensor, *expert: int) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        # a tensor of this product's own: its gradient leaves out what else is done with x
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        flat = x.detach().reshape(-1, x.shape[-1])  # [m, i]

        def weigh(gradient: Tensor) -> None:
            for precision, quantizer in quantizers.items():
                errors = (rounded(quantizer, flat) - flat).reshape(len(batch), -1)
                found = (gradient.reshape(len(batch), -1) * errors).sum(dim=1).tolist()
                for tally, score in zip(batch, found, strict=True):
                    tally.inputs[name, precision] += score

        own.register_hook(weigh)
        return own

    return watch
