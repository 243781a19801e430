"""The step of one token in parts, each a graph traced by torch from the blocks' own forward passes, with its weights
still outside. A part is traced once, however many layers are alike.

A component that uses its weight otherwise than as a value leaves a node of the domain `ssm_mp`, whose second input is
the weight: `Product` (x, weight), `Rows` (indices, weight), `Chosen` (x, weight, numbers of experts). `weights.py`
says what takes their place.

Dimensions: `b` sequences, `d` model, `V` vocabulary, `t` tokens so far, `m` tokens of a product, `n` outputs and `k`
inputs of a product, `q` inputs of an expert, `c` chosen experts.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Scan
from ssm_mp.blocks.experts import ExpertsMixing
from ssm_mp.config import Branch, Config
from ssm_mp.errors import ExportError
from ssm_mp.kernels.delta import delta_rule_reference
from ssm_mp.kernels.ssd import ssd_scan_reference
from ssm_mp.model import LanguageModel, Residual
from ssm_mp.modules.embedding import EmbeddingForm, PositionForm
from ssm_mp.modules.experts import EachExpert, ExpertsForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.parameter import Form, Parameter
from ssm_mp.precisions.stored import Stored

DOMAIN = "ssm_mp"
OPSET = 21
"""The first with all that is used, so that old runtimes (from 1.20 on) open the file."""
IDS, POSITION, LOGITS = "ids", "position", "logits"
AT = "layers.0"
"""Where a branch stands while it is traced: what its tensors' names begin with."""
GROWING = "t"
"""What stands in a state's shape for the number of tokens so far."""
_ANY = torch.export.Dim.DYNAMIC


Shape = tuple[int | str, ...]
"""Of a state, without the sequences; `t` where it grows."""
Shapes = tuple[Shape, ...]
"""Of a block's states."""


@dataclass(frozen=True)
class Carried:
    """A state between tokens: its name, and its shape without the sequences, `t` where it grows."""

    name: str
    shape: Shape

    @property
    def new(self) -> str:
        """The name of the output that is the next step's input."""
        return f"{self.name}.new"

    @property
    def is_empty(self) -> bool:
        """Whether it never holds anything, such as the inputs before a convolution of one tap."""
        return 0 in self.shape


@torch.inference_mode()
def carried(model: LanguageModel) -> tuple[tuple[tuple[Carried, ...], ...], ...]:
    """The states of a model, layer after layer and block after block: what grows is what two tokens leave longer than
    one does."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    one, two = (model.carry(ids[:, :length])[1] for length in (1, 2))
    return tuple(
        tuple(
            tuple(
                Carried(f"layers.{i}.{part.name}.state.{j}", _shape(*tensors))
                for j, tensors in enumerate(zip(*states, strict=True))
            )
            for part, *states in zip((p for branch in branches for p in branch.parts), first, second, strict=True)
        )
        for i, (branches, first, second) in enumerate(zip(model.config.branches, one, two, strict=True))
    )


def _shape(after_one: Tensor, after_two: Tensor) -> Shape:
    sizes = zip(after_one.shape[1:], after_two.shape[1:], strict=True)
    return tuple(one if one == two else GROWING for one, two in sizes)


@dataclass(frozen=True, eq=False)
class Fragment:
    """A part of the step as a graph (an `onnx.ModelProto`).

    inputs: the names of what comes in, states included; weights are further inputs, named as `parameters`.
    """

    graph: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]


@cache
def branch_fragment(d_model: int, branch: Branch, shapes: tuple[Shapes, ...]) -> Fragment:
    """A residual branch of any layer: `x`, `state.0.0`, … → `y`, `new.0.0`, …; its parameters are named from `AT` on.

    shapes: of each block's states, as `Carried` has them.
    """
    held = {
        f"{p}.{i}": shape for p, shapes_of in enumerate(shapes) for i, shape in enumerate(shapes_of) if 0 not in shape
    }
    states = [torch.empty(3, *(5 if size == GROWING else int(size) for size in shape)) for shape in held.values()]
    parameters = tuple(branch_parameters(branch, d_model))
    growing = [{0: _ANY} | {i + 1: _ANY for i, size in enumerate(shape) if size == GROWING} for shape in held.values()]
    module = TracedBranch(branch, parameters, shapes)
    return _traced(
        module, (torch.empty(3, 1, d_model), states), ({0: _ANY}, growing), parameters,
        ("x", *(f"state.{at}" for at in held)), ("y", *(f"new.{at}" for at in held)),
    )  # fmt: skip


def branch_parameters(branch: Branch, d_model: int) -> Iterator[Parameter]:
    """A branch's tensors, as `Config.parameters` has them."""
    yield from branch.norm.parameters(f"{AT}.{branch.norm_name}", 0, d_model)
    for part in branch.parts:
        yield from part.block.parameters(f"{AT}.{part.name}", 0)


@cache
def ends_fragment(config: Config) -> Fragment:
    """What comes before the layers and after them: `ids`, `position` where there are learned ones, and the last hidden
    state `last` → the first, `first`, and `logits`."""
    parameters = tuple(parameter for parameter in config.parameters() if parameter.layer is None)
    has_positions = config.position_table is not None
    position = torch.zeros(1, dtype=torch.int64) if has_positions else None
    return _traced(
        TracedEnds(config, parameters),
        (torch.zeros(3, 1, dtype=torch.int64), torch.empty(3, 1, config.d_model), position),
        ({0: _ANY}, {0: _ANY}, {} if has_positions else None),
        parameters, (IDS, "last", *([POSITION] if has_positions else [])), ("first", LOGITS),
    )  # fmt: skip


def _traced(
    module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...], parameters: tuple[Parameter, ...],
    names: tuple[str, ...], outputs: tuple[str, ...],
) -> Fragment:  # fmt: skip
    """The graph of a module that is called with `inputs` and its weights.

    Raises ExportError where torch is too old, or cannot trace it.
    """
    if not hasattr(torch.onnx, "ops"):
        raise ExportError(
            f"onnx: torch 2.8 or later is needed to trace a step, found {torch.__version__}; update torch"
        )
    weights = [torch.empty(parameter.shape) for parameter in parameters]
    try:
        with _quietly():
            program = torch.onnx.export(
                module.eval(), (*inputs, weights), dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes=(*dynamic, [None] * len(weights)),
                input_names=[*names, *(parameter.name for parameter in parameters)], output_names=list(outputs),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0]
        raise ExportError(
            f"onnx: torch {torch.__version__} cannot trace {type(module).__name__} with {len(weights)} tensors, the "
            f"first {parameters[0].name}: {cause}; export another format, or the artifact"
        ) from error
    assert program is not None
    return Fragment(program.model_proto, names, outputs, parameters)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's remarks on its own machinery."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class TracedBranch(nn.Module):
    """A residual branch with its weights as arguments."""

    def __init__(self, branch: Branch, parameters: Sequence[Parameter], shapes: tuple[Shapes, ...]) -> None:
        super().__init__()
        self.branch = branch
        self.parameters_of = tuple(parameters)
        self.shapes = shapes

    def forward(self, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        """`x [b, 1, d]`, states `[b, …]` and weights → `[b, 1, d]`, and new states."""
        residual = Residual(self.branch, _modules(self.parameters_of, weights), AT, _scans(self.branch))
        given = iter(states)
        before = [
            tuple(x.new_zeros(x.shape[0], *map(int, shape)) if 0 in shape else next(given) for shape in shapes)
            for shapes in self.shapes
        ]
        y, after = residual.eval().carry(x, before)
        kept = [
            tensor
            for found, shapes in zip(after, self.shapes, strict=True)
            for tensor, shape in zip(found, shapes, strict=True)
            if 0 not in shape
        ]
        return (y, *kept)


class TracedEnds(nn.Module):
    """Embedding, final norm and head, with their weights as arguments."""

    def __init__(self, config: Config, parameters: Sequence[Parameter]) -> None:
        super().__init__()
        self.config = config
        self.parameters_of = tuple(parameters)

    def forward(
        self, ids: Tensor, last: Tensor, position: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`ids [b, 1]`, the last hidden state `[b, 1, d]`, `position [1]` → the first one, and `[b, 1, V]`."""
        config, modules = self.config, _modules(self.parameters_of, weights)
        x = modules["embedding"](ids)  # [b, 1, d]
        if config.embedding_multiplier != 1.0:
            x = x * config.embedding_multiplier
        if position is not None:
            x = x + modules["position_embedding"](position)
        normed = modules["norm"](last)
        if config.logit_multiplier != 1.0:
            normed = normed * config.logit_multiplier
        table = modules["embedding"]
        assert isinstance(table, TracedTable)
        return x, table.project(normed) if config.tied else modules["lm_head"](normed)


def _scans(branch: Branch) -> dict[str, Scan]:
    """The plain recurrences, of one token; those of torch's operators that are in place or in chunks are for many."""
    blocks = [part.block for part in branch.parts]
    found = {block.word: block.differentiable for block in blocks if block.differentiable is not None}
    return {**found, "mamba2": ssd_scan_reference, "delta_rule": delta_rule_reference, "experts": all_experts}


def _modules(parameters: Sequence[Parameter], weights: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Components that are traced, by name."""
    grouped: dict[str, dict[str, Stored]] = defaultdict(dict)
    forms: dict[str, Form] = {}
    for parameter, value in zip(parameters, weights, strict=True):
        grouped[parameter.component][parameter.leaf] = Weight(parameter, value)
        forms[parameter.component] = parameter.form
    return {name: _module(forms[name], tensors) for name, tensors in grouped.items()}


def _module(form: Form, tensors: Mapping[str, Stored]) -> nn.Module:
    match form:
        case LinearForm():
            return TracedLinear(tensors["weight"], tensors.get("bias"))
        case EmbeddingForm() | PositionForm():
            return TracedTable(tensors["weight"])
        case ExpertsForm():
            return TracedExperts(tensors["weight"], form.count)
    return form.module(tensors, None)


class Weight(Stored):
    """A weight that is an input of the traced graph."""

    def __init__(self, parameter: Parameter, value: Tensor) -> None:
        super().__init__()
        self.parameter = parameter
        self.value = value

    @property
    def is_trained(self) -> bool:
        return True  # what is made of it belongs into the graph, and is not kept for another one

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    def tensor(self) -> Tensor:
        return self.value

    def rows(self, index: Tensor) -> Tensor:
        return _node("Rows", (index, self.value), (*index.shape, self.shape[1]))

    def arrays(self) -> dict[str, Tensor]:
        return {"": self.value}


def _node(word: str, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The output of a node of `DOMAIN`, float32 of this shape."""
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{word}", inputs, dtype=torch.float32, shape=shape, version=1)


class TracedLinear(nn.Module):
    """A projection."""

    def __init__(self, weight: Stored, bias: Stored | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`."""
        y = _node("Product", (x, self.weight.tensor()), (*x.shape[:-1], self.weight.shape[0]))
        return y if self.bias is None else y + self.bias.tensor()


class TracedTable(nn.Module):
    """Rows by their numbers: tokens or positions; and the tied head."""

    def __init__(self, weight: Stored) -> None:
        super().__init__()
        self.weight = weight
        self.project = TracedLinear(weight, None)

    def forward(self, index: Tensor) -> Tensor:
        """`index [...]` → `[..., d]`."""
        return self.weight.rows(index)


class TracedExperts(nn.Module):
    """One kind of projection of all experts as one component; only those chosen are read."""

    def __init__(self, weight: Stored, count: int) -> None:
        super().__init__()
        self.weight = weight
        self.count = count

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """`x [m, q]`, or `[m, c, q]`, one for each choice, and `chosen [m, c]` → `[m, c, n]`."""
        rows = self.weight.shape[0] // self.count
        each = x[:, None] if x.dim() == 2 else x  # [m, 1 or c, q]
        return _node("Chosen", (each, self.weight.tensor(), chosen), (*chosen.shape, rows))


def all_experts(mixing: ExpertsMixing, inputs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As `chosen_experts`, without a loop that depends on the choice: experts of one component are gathered by their
    numbers; of those that are components each, all are computed, and those not chosen left out of the sum."""
    if not isinstance(mixing.outward, EachExpert):
        hidden = mixing.hidden.of(*(project(inputs, chosen) for project in mixing.inward))  # [m, c, E]
        shares: Tensor = mixing.outward(hidden, chosen) * weights[..., None]  # [m, c, q]
        return shares.sum(dim=1)
    out = torch.zeros_like(inputs)
    for expert in range(mixing.experts):
        here = chosen == expert  # [m, c]
        hidden = mixing.hidden.of(*(project(inputs, expert) for project in mixing.inward))
        share = mixing.outward(hidden, expert) * (weights * here).sum(dim=-1, keepdim=True)
        out = out + torch.where(here.any(dim=-1, keepdim=True), share, 0.0)  # what is infinite there is not here
    return out
