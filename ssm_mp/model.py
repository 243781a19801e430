"""A language model: embedding, positions, layers of residual branches, final norm and head.

Dimensions: `b` batch, `l` length, `d` model, `V` vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Mixing, Parts, Scan, State
from ssm_mp.config import Branch, Config
from ssm_mp.errors import DataError
from ssm_mp.kernels import calls
from ssm_mp.modules.embedding import BlockedEmbedding, blocked_embedding
from ssm_mp.modules.inputs import Multiplied, Rounding
from ssm_mp.modules.linear import Multiplier, Projection
from ssm_mp.modules.norm import Norm
from ssm_mp.modules.parameter import Form, held_by
from ssm_mp.precisions.matrix import FEW_ROWS
from ssm_mp.precisions.stored import ByteTensor, Stored, source_tensor
from ssm_mp.programs.branch import CompiledBranch, Observer
from ssm_mp.programs.program import Into, NotCompiledError, Program, say_once

AfterLayer = Callable[[nn.Module], None]
"""Told each part of a model once everything to be computed has passed through it."""

_LOGIT_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits held at once: few enough to stay near a core, and enough that the interpreter is no burden; on a GPU, enough
to fill it."""

LayerState = tuple[State, ...]
"""What a layer carries from token to token: each of its blocks' state, in order."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """Final norm and head, for many calls; `held`: for how many tokens at most there may be logits in memory."""

    final: Callable[[Tensor], Tensor]
    head: Projection
    held: int

    def nll(self, x: Tensor, columns: Tensor) -> Tensor:
        """Negative log-likelihood of the tokens in `columns [m]` of the scores of `x [m, d]`: float64 `[m]`."""
        return self.head.nll(self.final(x), columns, self.held)

    def divergence(self, x: Tensor, columns: Tensor, reference: Scorer, expected: Tensor) -> tuple[Tensor, Tensor]:
        """`nll`, and KL(reference ‖ this) of the scores of `expected [m, d]` there, `x [m, d]` here: float64 `[m]`."""
        return self.head.divergence(self.final(x), columns, reference.head, reference.final(expected), self.held)

    def another_top(self, x: Tensor, reference: Scorer, expected: Tensor) -> Tensor:
        """Whether the most probable token of `x [m, d]` here is another than of `expected [m, d]` there: bool `[m]`."""
        return self.head.another_top(self.final(x), reference.head, reference.final(expected), self.held)


class Residual(nn.Module):
    """A residual branch: norm, blocks side by side, multipliers."""

    def __init__(self, branch: Branch, modules: Mapping[str, nn.Module], at: str, scans: Mapping[str, Scan]) -> None:
        """`at`: where the layer stands, such as `layers.0`."""
        super().__init__()
        self.observer: Observer | None = None
        self.norm = modules[f"{at}.{branch.norm_name}"]
        self.mixings = nn.ModuleList()
        for part in branch.parts:
            parts = Parts(modules, f"{at}.{part.name}.", dict(part.block.names))
            self.mixings.append(part.block.module(parts, scans.get(part.block.word)))
        self._multipliers = [(part.before, part.after) for part in branch.parts]
        self._residual = branch.residual
        self._compiled: tuple[object, CompiledBranch | None, object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # addresses cannot be copied

    def carry(self, x: Tensor, before: Sequence[State] | None) -> tuple[Tensor, list[State]]:
        """`x [b, l, d]`, and its blocks' states before it (None: the beginning) → `[b, l, d]`, and those after it."""
        compiled = self.compiled() if calls.usable(x) and x.shape[0] * x.shape[1] > FEW_ROWS else None
        if compiled is not None:
            return compiled(x, before, self.observer)
        u, mixed, states = self.norm(x), None, []
        for i, (mixing, (enter, leave)) in enumerate(zip(self.mixings, self._multipliers, strict=True)):
            y, state = mixing(u if enter == 1.0 else u * enter, None if before is None else before[i])
            y = y if leave == 1.0 else y * leave
            mixed = y if mixed is None else mixed + y
            states.append(state)
        assert mixed is not None
        return x + (mixed if self._residual == 1.0 else mixed * self._residual), states

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, from the beginning."""
        return self.carry(x, None)[0]

    def emit(self, program: Program) -> list[int]:
        """Have the branch computed by the kernels: in the program's stream. How many tensors each block carries.

        Raises NotCompiledError where they cannot.
        """
        counts, u = [], program.norm(self.norm, program.stream)
        for mixing, (enter, leave) in zip(self.mixings, self._multipliers, strict=True):
            if not isinstance(mixing, Mixing):
                raise NotCompiledError(f"{type(mixing).__name__} in place of a block")
            carried, factor = len(program.carried), leave * self._residual
            entered = u if enter == 1.0 else program.scaled(u, enter)
            onto = Into(program.stream, adds=True)
            if factor == 1.0:
                mixing.emit(program, entered, onto)
            else:
                y = program.new(program.stream.width)
                mixing.emit(program, entered, Into(y))
                program.scaled(y, factor, onto)
            counts.append(len(program.carried) - carried)
        program.forget_values()
        return counts

    def compiled(self) -> CompiledBranch | None:
        """The branch as one call for many tokens, made once; None where there is no such way, or torch is faster."""
        stored = [module for module in self.modules() if isinstance(module, Stored)]
        if any(tensor.is_trained for tensor in stored):
            return None
        inputs = [module.inputs_stamp for module in self.modules() if isinstance(module, Multiplier)]
        scans = [getattr(mixing, "scan", None) for mixing in self.mixings]
        stamp = ([tensor.stamp for tensor in stored], inputs, scans)
        current = self._compiled
        if current is None or current[0] != stamp:
            # what was read is held too: another tensor in its place would have its stamp
            current = (stamp, self._compile(), [tensor.arrays() for tensor in stored])
            self._compiled = current
        return current[1]

    def _compile(self) -> CompiledBranch | None:
        norm = self.norm
        if not isinstance(norm, Norm) or norm.weight.device.type != "cpu":
            return None
        program = Program(norm.weight.shape[0], many=True)
        try:
            counts = self.emit(program)
        except NotCompiledError as error:
            say_once(error)
            return None
        program.close()
        return CompiledBranch(program, counts)

    def forget(self) -> None:
        """Let go of the compiled branch, and so of tensors that may be held elsewhere from now on."""
        self._compiled = None


class Layer(nn.Module):
    """Residual branches, one after another."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def carry(self, x: Tensor, before: LayerState | None) -> tuple[Tensor, LayerState]:
        """`x [b, l, d]`, and the state before it (None: the beginning) → `[b, l, d]`, and the state after it."""
        states: list[State] = []
        for branch in self.branches:
            assert isinstance(branch, Residual)
            own = None if before is None else before[len(states) : len(states) + len(branch.mixings)]
            x, found = branch.carry(x, own)
            states += found
        return x, tuple(states)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`, from the beginning."""
        for branch in self.branches:
            x = branch(x)
        return x


class LanguageModel(nn.Module):
    """Token ids `[b, l]` → logits `[b, l, V]`, in three stages that can be run apart: embed, layers, head.

    after_layer: of a model too large for memory, to be run with all inputs layer by layer; it is then told each layer
    that they have passed, the embedding and the head too. None: whoever runs it takes the inputs in any order.
    """

    def __init__(
        self,
        config: Config,
        modules: Mapping[str, nn.Module],
        scans: Mapping[str, Scan],
        after_layer: AfterLayer | None = None,
    ) -> None:
        """`modules`: the components' by name; `scans` as in `assemble`."""
        super().__init__()
        self.config = config
        self.after_layer = after_layer
        self._components = dict(modules)
        blocks = [modules[f"embedding.blocks.{b}"] for b in range(len(config.embedding_blocks))]
        self.embedding = blocked_embedding(blocks, config.vocabulary) if blocks else modules["embedding"]
        self.position_embedding = None if config.position_table is None else modules["position_embedding"]
        self.layers = nn.ModuleList(
            Layer([Residual(branch, modules, f"layers.{i}", scans) for branch in branches])
            for i, branches in enumerate(config.branches)
        )
        self.norm = modules["norm"]
        self.lm_head = None if config.tied else modules["lm_head"]

    def component(self, name: str) -> nn.Module:
        """The module of a component. Raises KeyError for another name."""
        return self._components[name]

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Token ids `[b, l]`, the first at position `start` → `[b, l, d]`, positions added.

        Raises DataError beyond `max_tokens` of the configuration.
        """
        end, most = start + ids.shape[1], self.config.max_tokens
        if most is not None and end > most:
            raise DataError(f"a sequence of {end} tokens, but {self.config.limit}")
        x: Tensor = self.embedding(ids)
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        if self.position_embedding is None:
            return x
        positions: Tensor = self.position_embedding(end, start)
        return x + positions

    def final(self, x: Tensor) -> Tensor:
        """Last hidden state `[..., d]` → what the head multiplies: normalised, logits' multiplier included, unless the
        head rounds its inputs, which comes first."""
        normed: Tensor = self.norm(x)
        if self.config.logit_multiplier == 1.0 or self._head_rounding is not None:
            return normed
        return normed * self.config.logit_multiplier

    @property
    def _head_rounding(self) -> Rounding | None:
        head = self.embedding if self.lm_head is None else self.lm_head
        return head.rounding if isinstance(head, Multiplier) else None

    def _head_projection(self) -> Projection:
        """The head for many calls."""
        head = self.embedding if self.lm_head is None else self.lm_head
        projection: Projection = head.projection()  # type: ignore[operator]  # nn.Module attributes are untyped
        rounding = self._head_rounding
        if rounding is None or self.config.logit_multiplier == 1.0:
            return projection
        return replace(projection, rounding=Multiplied(rounding, self.config.logit_multiplier))

    def scores(self, x: Tensor) -> Tensor:
        """Last hidden state `[..., d]` → logits `[..., V]` in the head's own order, which `columns` tells."""
        if self._head_rounding is not None:
            return self._head_projection()(self.final(x))
        head = self.embedding.project if self.lm_head is None else self.lm_head
        logits: Tensor = head(self.final(x))  # type: ignore[operator]  # nn.Module attributes are untyped
        return logits

    def scorer(self) -> Scorer:
        """`scores` for many calls: the head's weights are unpacked once."""
        return Scorer(self.final, self._head_projection(), self.head_tokens)

    def columns(self, ids: Tensor) -> Tensor:
        """Where the logits of tokens stand in `scores`; anywhere but in a tied head of blocks, at their ids."""
        if self.lm_head is None and isinstance(self.embedding, BlockedEmbedding):
            return self.embedding.column_of[ids]
        return ids

    def head(self, x: Tensor) -> Tensor:
        """Last hidden state `[..., d]` → logits `[..., V]` in the order of the token ids."""
        logits = self.scores(x)
        if self.lm_head is None and isinstance(self.embedding, BlockedEmbedding):
            return logits.index_select(-1, self.embedding.column_of)
        return logits

    def hidden(self, ids: Tensor, before_layer: Callable[[], None] | None = None) -> Tensor:
        """Token ids `[b, l]` → last hidden state `[b, l, d]`; `before_layer` is called before each layer."""
        x = self.embed(ids)
        for layer in self.layers:
            if before_layer is not None:
                before_layer()
            x = layer(x)
        return x

    def carry(
        self, ids: Tensor, before: Sequence[LayerState] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Token ids `[b, l]` after those that left the states `before` → last hidden state `[b, l, d]` and new states.

        start: the position of the first of these tokens.
        """
        x, states = self.embed(ids, start), []
        for i, layer in enumerate(self.layers):
            x, state = layer.carry(x, None if before is None else before[i])  # type: ignore[operator]
            states.append(state)
        return x, tuple(states)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[b, l]` → logits `[b, l, V]`."""
        return self.head(self.hidden(ids))

    @property
    def device(self) -> torch.device:
        """Where it is held. Not that of a torch parameter: where everything is int8 there is none."""
        return next(module.device for module in self.norm.modules() if isinstance(module, Stored))

    @property
    def head_tokens(self) -> int:
        """How many tokens' logits may be held at once; at least one."""
        device = self.device.type
        return max(1, _LOGIT_BYTES[device] // (4 * self.config.vocabulary))


def assemble(
    config: Config,
    modules: Mapping[str, nn.Module],
    scans: Mapping[str, Scan] | None = None,
    after_layer: AfterLayer | None = None,
) -> LanguageModel:
    """A model of component modules by component name, in eval mode.

    scans: by a block's word, what takes the place of its own fast scan, which cannot be differentiated. after_layer: as
    in `LanguageModel`.
    """
    return LanguageModel(config, modules, scans or {}, after_layer).eval()


def differentiable_scans(config: Config) -> dict[str, Scan]:
    """For `assemble`: the scans that gradients pass through."""
    blocks = {part.block for branches in config.branches for branch in branches for part in branch.parts}
    return {block.word: block.differentiable for block in blocks if block.differentiable is not None}


def build(
    config: Config,
    tensors: Mapping[str, Tensor],
    scans: Mapping[str, Scan] | None = None,
    after_layer: AfterLayer | None = None,
) -> LanguageModel:
    """The FP32 model of canonical float tensors, held as they are (no copy); the others as in `assemble`."""
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    forms: dict[str, Form] = {}
    for parameter in config.parameters():
        held = ByteTensor if parameter.role == "index" else source_tensor
        stored[parameter.component][parameter.leaf] = held(tensors[parameter.name])
        forms[parameter.component] = parameter.form
    modules = {name: forms[name].module(held, None) for name, held in stored.items()}
    return assemble(config, modules, scans, after_layer)


def in_float32(model: LanguageModel) -> LanguageModel:
    """The same FP32 model with every tensor in memory in float32: what its speed is measured of."""
    tensors: dict[str, Tensor] = {}
    for parameter in model.config.parameters():
        tensors[parameter.name] = held_by(model.component(parameter.component), parameter.leaf).tensor()
    return build(model.config, tensors)
