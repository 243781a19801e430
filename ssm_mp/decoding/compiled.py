"""A Mamba-1 model as one compiled call a token: every weight is read once, as it is stored, whatever its precision.

Dimensions: `b` batch, `d` model, `I` inner, `N` state, `K` convolution kernel, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssm_mp.blocks.mamba1 import Mamba1, Mamba1Mixing
from ssm_mp.blocks.mamba1_compiled import Branch, Held, knows
from ssm_mp.config import Config
from ssm_mp.kernels import calls, decoding, matrices
from ssm_mp.model import LanguageModel, Layer, LayerState, Residual
from ssm_mp.modules.embedding import BlockedEmbedding, Embedding
from ssm_mp.modules.linear import Linear

MOST_SEQUENCES = 8
"""With more at a time, products of matrices are faster than rows one after another."""


class CompiledDecoder:
    """A decoding session: `step` takes one token of every sequence further, carrying the states in place."""

    def __init__(self, model: LanguageModel, states: Sequence[LayerState], position: int) -> None:
        """`states` are copied. Only for what `CompiledDecoder.of` would take."""
        config, block = model.config, _only_block(model.config)
        assert block is not None
        self._model, self.position = model, position
        self._held = Held()
        batch = states[0][0][0].shape[0]
        layers = (decoding.Layer * len(config.branches))(
            *(self._layer(layer, state) for layer, state in zip(model.layers, states, strict=True))
        )
        heads = [self._held.matrix(head) for head in _heads(model)]
        self._x, self._logits = torch.empty(batch, config.d_model), torch.empty(batch, config.vocabulary)
        self._structure = decoding.Model(
            batch, config.d_model, block.d_inner, block.d_state, block.dt_rank, block.d_conv, config.vocabulary,
            len(config.branches), len(heads), layers, self._held.norm(model.norm),
            (matrices.Matrix * len(heads))(*heads),
            self._x.data_ptr(), self._logits.data_ptr(), None,
        )  # fmt: skip
        self._scratch = torch.empty(decoding.scratch_floats(self._structure))
        self._structure.scratch = self._scratch.data_ptr()

    @classmethod
    def of(cls, model: LanguageModel, states: Sequence[LayerState], position: int) -> CompiledDecoder | None:
        """A session that goes on from `states`; None where there is no compiled way: other blocks than Mamba-1's, not
        on a CPU, no compiler, more sequences than it is good for, or a precision that the kernels do not know."""
        if _only_block(model.config) is None:
            return None
        held = [tensor for layer in states for state in layer for tensor in state]
        if held[0].shape[0] > MOST_SEQUENCES or not calls.usable(*held):
            return None
        projections = (part for layer in model.layers for part in _branch(layer).projections)
        if not all(knows(part) for part in (*projections, *_heads(model))):
            return None
        return cls(model, states, position)

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every sequence, `[b]` → logits `[b, V]` in the order of the token ids."""
        with torch.inference_mode():
            self._x.copy_(self._model.embed(tokens[:, None], self.position)[:, 0])
            decoding.decode_step(self._structure)
            self.position += 1
            embedding = self._model.embedding
            if self._model.lm_head is None and isinstance(embedding, BlockedEmbedding):
                return self._logits.index_select(-1, embedding.column_of)
            return self._logits.clone()

    def _layer(self, layer: nn.Module, state: LayerState) -> decoding.Layer:
        found = self._held.layer(_branch(layer), many=False)
        found.conv, found.state = (self._held.floats(tensor) for tensor in state[0])
        return found


def _branch(layer: nn.Module) -> Branch:
    """The components of a layer that is one Mamba-1 mixer."""
    assert isinstance(layer, Layer)
    (residual,) = layer.branches
    assert isinstance(residual, Residual)
    (mixing,) = residual.mixings
    assert isinstance(mixing, Mamba1Mixing)
    return mixing.branch(residual.norm)


def _only_block(config: Config) -> Mamba1 | None:
    """The block that every layer is, where that is a Mamba-1 mixer that the kernels know, and nothing else."""
    parts = {part for branches in config.branches for branch in branches for part in branch.parts}
    plain = all(len(branches) == 1 and branches[0].residual == 1.0 for branches in config.branches)
    if len(parts) != 1 or not plain or config.embedding_multiplier != 1.0 or config.logit_multiplier != 1.0:
        return None
    (part,) = parts
    block = part.block
    if not isinstance(block, Mamba1) or block.has_inner_norms or config.final_norm.one_plus:
        return None
    return block if part.before == part.after == 1.0 else None


def _heads(model: LanguageModel) -> list[Linear | Embedding]:
    """What makes the logits, one after another; a tied head may be in blocks."""
    embedding = model.embedding
    tied = list(embedding.blocks) if isinstance(embedding, BlockedEmbedding) else [embedding]
    found: list[Linear | Embedding] = []
    for head in tied if model.lm_head is None else [model.lm_head]:
        assert isinstance(head, Linear | Embedding)
        found.append(head)
    return found
