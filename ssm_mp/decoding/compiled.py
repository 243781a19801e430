"""A model as one compiled call a token: every weight is read once, as it is stored, whatever its precision.

Dimensions: `b` batch, `d` model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_mp.errors import DataError
from ssm_mp.kernels import calls
from ssm_mp.kernels.program import RESULT, Prepared
from ssm_mp.model import LanguageModel, Layer, LayerState, Residual
from ssm_mp.modules.embedding import BlockedEmbedding, Embedding, PositionEmbedding
from ssm_mp.modules.linear import Linear
from ssm_mp.programs.branch import held_states
from ssm_mp.programs.program import Into, NotCompiledError, Program, Value, say_once

MOST_SEQUENCES = 8
"""With more at a time, products of matrices are faster than rows one after another."""
_ROOM = 256
"""Tokens that states which grow have room for beyond those that they hold."""


class CompiledDecoder:
    """A decoding session: `step` takes one token of every sequence further, carrying the states in place."""

    def __init__(self, model: LanguageModel, program: Program, states: Sequence[LayerState], position: int) -> None:
        """`states` are copied. Made by `CompiledDecoder.of`."""
        self._model, self._program, self.position = model, program, position
        former = [tensor for layer in states for state in layer for tensor in state]
        batch, self._capacity = former[0].shape[0], position + _ROOM
        self._states = held_states(program.carried, former, batch, position, self._capacity)
        self._x = torch.empty(batch, 1, model.config.d_model)
        self._logits = torch.empty(batch, 1, model.config.vocabulary)
        self._calls: Prepared | None = None

    @classmethod
    def of(cls, model: LanguageModel, states: Sequence[LayerState], position: int) -> CompiledDecoder | None:
        """A session that goes on from `states`; None where there is no compiled way: a block or a precision that the
        kernels do not know, not on a CPU, no compiler, or more sequences than it is good for."""
        held = [tensor for layer in states for state in layer for tensor in state]
        if not held or held[0].shape[0] > MOST_SEQUENCES or not calls.usable(*held):
            return None
        try:
            return cls(model, program_of(model), states, position)
        except NotCompiledError as error:
            say_once(error)
            return None

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every sequence, `[b]` → logits `[b, V]` in the order of the token ids.

        Raises DataError where there is not one token of each, or the model has too few positions.
        """
        model, most = self._model, self._model.config.max_tokens
        if tokens.shape != self._x.shape[:1]:
            batch = self._x.shape[0]
            raise DataError(f"expected one token for each of {batch} sequences, found shape {list(tokens.shape)}")
        with torch.inference_mode():
            if most is not None and self.position >= most:
                raise DataError(f"a sequence of {self.position + 1} tokens, but {model.config.limit}")
            if self.position == self._capacity:
                self._grow()
            if self._calls is None:
                held = self._states
                self._calls = self._program.calls.prepared(self._x, self._logits, held, self._capacity, few=True)
            self._calls.run(self._x, self.position, tokens.long().contiguous())
            self.position += 1
            if model.lm_head is None and isinstance(model.embedding, BlockedEmbedding):
                return self._logits[:, 0].index_select(-1, model.embedding.column_of)
            return self._logits[:, 0].clone()

    def _grow(self) -> None:
        """Room for twice as many tokens in the states that grow."""
        self._calls, self._capacity = None, 2 * self._capacity
        for i, carried in enumerate(self._program.carried):
            if carried.grows:
                former = carried.view(self._states[i], self.position)
                (self._states[i],) = held_states([carried], [former], former.shape[0], self.position, self._capacity)


def program_of(model: LanguageModel) -> Program:
    """From the embedding to the logits. Raises NotCompiledError where the kernels cannot compute it."""
    config = model.config
    program = Program(config.d_model, many=False)
    table = model.position_embedding
    positions = table(config.max_tokens) if isinstance(table, PositionEmbedding) else None
    program.lookup(model.embedding, config.embedding_multiplier, positions)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for residual in layer.branches:
            if not isinstance(residual, Residual):
                raise NotCompiledError(f"{type(residual).__name__} in place of a branch")
            residual.emit(program)
    u = program.norm(model.norm, program.stream)
    if config.logit_multiplier != 1.0:
        program.scaled(u, config.logit_multiplier, Into(u))
    start = 0
    for head in _heads(model):
        width = head.weight.shape[0]
        program.product(head, u, Into(Value(RESULT, config.vocabulary, start, width)))
        start += width
    program.close(results=config.vocabulary)
    return program


def _heads(model: LanguageModel) -> list[Linear | Embedding]:
    """What makes the logits, one after another; a tied head may be in blocks."""
    embedding = model.embedding
    tied = list(embedding.blocks) if isinstance(embedding, BlockedEmbedding) else [embedding]
    found: list[Linear | Embedding] = []
    for head in tied if model.lm_head is None else [model.lm_head]:
        if not isinstance(head, Linear | Embedding):
            raise NotCompiledError(f"{type(head).__name__} in place of a head")
        found.append(head)
    return found
