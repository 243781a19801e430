"""Scores of quantisation errors against the gradient of a window's likelihood, layer by layer with recomputation.

`whole_graph` is the readable reference: the model once forward and backward for each window, all of its activations
and gradients' errors in memory as they come. `layer_by_layer` gives the same numbers to rounding. A chunk of windows
goes forward without gradients, and only each layer's input is kept; then, from the last layer to the first, each layer
alone is run again with gradients. So one layer is held at a time: its float32 weights, the activations of one window,
or of as many as a bound allows, and the errors of its components, which are unpacked once a chunk.

Of a layer whose free components are all plain products and convolutions, several windows are run at once: the gradient
of a window's weights is made of the product's inputs and its outputs' gradients, and a convolution has weights of its
own for each window. Other components, whose gradients autograd adds up over windows, are run window by window.

Dimensions: `w` windows, `c` windows of a chunk, `b` windows run at once, `L` window length, `d` model, `V` vocabulary,
`n` outputs and `i` inputs of a product, `k` components at precisions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.conversion.calibrate import Watcher, observed
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import advance, start
from ssm_mp.model import LanguageModel, assemble, differentiable_scans
from ssm_mp.modules.convolution import DepthwiseConv, convolved
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.experts import ExpertsLinear
from ssm_mp.modules.inputs import InputQuantizer, rounded
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.stored import FloatTensor, Stored

Key = tuple[str, str]
"""Component and precision."""

_INPUTS, _ERRORS, _SAVED = 1 << 28, 1 << 29, 1 << 28
"""Bytes at most of the layers' inputs of a chunk, of the unpacked errors of a layer, and of what autograd saves of a
layer for windows that are run at once."""
_CHUNK = 16
"""Windows of a chunk at most: what an interruption loses."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each window, ∇L_w · dW (`weights`) and ∇L_w · dx (`inputs`) of each key: float64 `[w, k]`."""

    weights: np.ndarray
    inputs: np.ndarray


def joined(parts: Sequence[Scores]) -> Scores:
    """Of all windows, one part after another."""
    return Scores(*(np.concatenate(each) for each in zip(*((p.weights, p.inputs) for p in parts), strict=True)))


def keys_of(workspace: Workspace) -> list[Key]:
    """Every free component at each of its choices."""
    return [(c.name, precision) for c in workspace.space.free for precision in workspace.space.choices[c.name]]


@dataclass(frozen=True, eq=False)
class Tally:
    """The scores of one window, those of weights and of inputs apart."""

    weights: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    inputs: dict[Key, float] = field(default_factory=lambda: defaultdict(float))


Batch = list[Tally]
"""Of the windows that are being run at once, in their order."""


def window_nll(model: LanguageModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood of one window `ids [1, L]`, summed over its L − 1 predicted tokens, nats."""
    return _nll(model, model.hidden(ids), ids)


def _nll(model: LanguageModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """The same from its last hidden states `[1, L, d]`."""
    logits = model.scores(hidden[:, :-1])  # [1, L − 1, V]
    return F.cross_entropy(logits.flatten(0, 1), model.columns(ids[:, 1:]).flatten(), reduction="sum")


def whole_graph(workspace: Workspace, windows: Windows, step: Callable[[], None] = lambda: None) -> Scores:
    """Scores of windows, each in one backward pass through the whole model. `step` is called after each window."""
    tallies, batch = [Tally() for _ in range(len(windows))], Batch()
    model = differentiable(workspace, batch)
    for tally, ids in zip(tallies, windows.ids.to(workspace.model.device).split(1), strict=True):
        batch[:] = [tally]
        window_nll(model, ids).backward()
        step()
    return _scores(tallies, keys_of(workspace))


def chunk_windows(workspace: Workspace) -> int:
    """Windows of a chunk: so many that the inputs of all layers stay below a bound."""
    config = workspace.model.config
    inputs = 4 * len(config.branches) * workspace.splits.search.length * config.d_model
    return max(1, min(_CHUNK, _INPUTS // inputs))


def layer_by_layer(workspace: Workspace, windows: Windows, step: Callable[[], None] = lambda: None) -> Scores:
    """Scores of the windows of one chunk. `step` is called after each of the layers, and after the head."""
    model = workspace.model
    tallies = [Tally() for _ in range(len(windows))]
    inputs = [start(model, windows)]
    for _ in model.layers:
        inputs.append(advance(model, inputs[-1]))
    states = [prefix.hidden.clone() for prefix in inputs]  # not of inference mode, which has no gradients
    del inputs
    ids = windows.ids.to(model.device)
    last = len(model.layers) + 1
    head = _Stage(workspace, {last} | ({0} if model.lm_head is None else set()))
    gradient = head.backward(states.pop(), tallies, lambda own, x, at: _nll(own, x, ids[at]), None)
    step()
    for i in reversed(range(len(model.layers))):
        gradient = _Stage(workspace, {i + 1}, i).backward(states.pop(), tallies, partial(_through, i), gradient)
        step()
    embedding = _Stage(workspace, {0})
    if embedding.components:
        embedding.backward(None, tallies, lambda own, x, at: own.embed(ids[at]), gradient)
    return _scores(tallies, keys_of(workspace))


def _through(layer: int, model: LanguageModel, x: Tensor, _: slice) -> Tensor:
    found: Tensor = model.layers[layer](x)
    return found


Run = Callable[[LanguageModel, Tensor, slice], Tensor]
"""A stage of a model applied to its input `[b, L, d]`, of these windows of a chunk."""


class _Stage:
    """The components that act at some stages of the forward pass, with gradients."""

    def __init__(self, workspace: Workspace, stages: Collection[int], layer: int | None = None) -> None:
        """layer: its number, where the stage is a layer."""
        self._workspace = workspace
        self.components = [c for c in workspace.space.free if c.stage in stages]
        self._modules = [workspace.model.component(c.name) for c in workspace.space.components if c.stage in stages]
        self._products = layer is not None and _of_products(workspace, self.components, layer)

    def backward(self, inputs: Tensor | None, tallies: Sequence[Tally], run: Run, gradient: Tensor | None) -> Tensor:
        """Add the scores of each window to its tally: gradients of the inputs `[c, L, d]` from those of the outputs.

        inputs: None where the stage takes token ids; gradient: None where the output is the loss.
        """
        batch = Batch()
        names = {component.name for component in self.components}
        model = differentiable(self._workspace, batch, names, products=self._products)
        found, began, count = list[Tensor](), 0, 1
        while began < len(tallies):
            at = slice(began, began + count)
            batch[:] = tallies[at]
            x = torch.empty(0) if inputs is None else inputs[at].requires_grad_()
            saved = _Saved()
            with torch.enable_grad(), saved:
                out = run(model, x, at)
            out.backward(None if gradient is None else gradient[at])
            found.append(torch.empty(0) if x.grad is None else x.grad)
            began += len(batch)
            if self._products:  # the first window has told what one takes
                count = max(1, _SAVED // max(1, saved.bytes // len(batch)))
        self._let_go()
        return torch.cat(found)

    def _let_go(self) -> None:
        """Tell a model that is run layer by layer that this part of it is done with."""
        after = self._workspace.model.after_layer
        if after is None:
            return
        forms = [_forms(self._workspace, component) for component in self.components]
        for module in (*self._modules, *(form for held in forms for form in held.values())):
            after(module)


class _Saved(saved_tensors_hooks):
    """Counts the bytes that autograd saves while it lasts, each storage once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def _of_products(workspace: Workspace, components: Sequence[Component], layer: int) -> bool:
    """Whether each of a layer's components is a product, or a convolution, of all tokens, window by window."""
    blocks = [part.block for branch in workspace.model.config.branches[layer] for part in branch.parts]
    plain = all(type(workspace.model.component(c.name)) in (Linear, DepthwiseConv) for c in components)
    return plain and not any(block.gathers_tokens for block in blocks)


def _scores(tallies: Sequence[Tally], keys: Sequence[Key]) -> Scores:
    weights, inputs = (
        np.array([[held.get(key, 0.0) for key in keys] for held in each], dtype=np.float64).reshape(-1, len(keys))
        for each in ([tally.weights for tally in tallies], [tally.inputs for tally in tallies])
    )
    return Scores(weights, inputs)


def differentiable(
    workspace: Workspace, batch: Batch, names: Collection[str] | None = None, *, products: bool = False
) -> LanguageModel:
    """The FP32 model over again; `backward` adds to the tallies of the batch and leaves no gradient.

    names: the free components that are differentiated, None: all of them. Their weights are float32, and share the
    model's memory where its own are; all other modules are the model's. products: whether they are all plain products
    and convolutions, so that the batch may be of several windows.
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
        if not products:
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


def _forms(workspace: Workspace, component: Component) -> dict[str, nn.Module]:
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
            errors = (_error(_stored(module, leaf), value) for module in modules)
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
        held = _stored(source, parameter.leaf)
        if isinstance(held, FloatTensor):
            held = FloatTensor(held.value.data.float())
            held.value.requires_grad_()
            held.value.register_post_accumulate_grad_hook(_weigher(component, parameter.leaf, errors, batch))
        tensors[parameter.leaf] = held
    return component.form.module(tensors, None)


class _Weighed(nn.Module):
    """A free component run for several windows at once, whose weights' gradients are multiplied likewise."""

    def __init__(self, component: Component, source: nn.Module, errors: _Errors, batch: Batch) -> None:
        super().__init__()
        self._component, self._errors, self._batch = component, errors, batch
        held = {parameter.leaf: _stored(source, parameter.leaf) for parameter in component.parameters}
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


def _stored(module: nn.Module, leaf: str) -> Stored:
    held = module if isinstance(module, Stored) else getattr(module, leaf)
    assert isinstance(held, Stored)
    return held


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
    for precision, module in _forms(workspace, component).items():
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
        flat = x.detach().reshape(-1, x.shape[-1])  # [m, k]

        def weigh(gradient: Tensor) -> None:
            for precision, quantizer in quantizers.items():
                errors = (rounded(quantizer, flat) - flat).reshape(len(batch), -1)
                found = (gradient.reshape(len(batch), -1) * errors).sum(dim=1).tolist()
                for tally, score in zip(batch, found, strict=True):
                    tally.inputs[name, precision] += score

        own.register_hook(weigh)
        return own

    return watch
