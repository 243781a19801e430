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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from search.measure.weighing import Batch, How, Key, Tally, differentiable, forms_of
from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import advance, start
from ssm_mp.model import LanguageModel
from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.linear import Linear

_INPUTS, _SAVED = 1 << 27, 1 << 27
"""Bytes at most of the layers' inputs of a chunk, and of what autograd saves of a layer for windows run at once."""
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
        self._how: How = "graph" if stages != {0} else "lookup"
        if layer is not None and _of_products(workspace, self.components, layer):
            self._how = "products"

    def backward(self, inputs: Tensor | None, tallies: Sequence[Tally], run: Run, gradient: Tensor | None) -> Tensor:
        """Add the scores of each window to its tally: gradients of the inputs `[c, L, d]` from those of the outputs.

        inputs: None where the stage takes token ids; gradient: None where the output is the loss.
        """
        batch = Batch()
        names = {component.name for component in self.components}
        model = differentiable(self._workspace, batch, names, self._how)
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
            if self._how == "products":  # the first window has told what one takes
                count = max(1, _SAVED // max(1, saved.bytes // len(batch)))
        self._let_go()
        return torch.cat(found)

    def _let_go(self) -> None:
        """Tell a model that is run layer by layer that this part of it is done with."""
        after = self._workspace.model.after_layer
        if after is None:
            return
        forms = [forms_of(self._workspace, component) for component in self.components]
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
