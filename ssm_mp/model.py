"""What both families share: embedding, positions, a stack of layers, final norm and head.

Dimensions: `b` batch, `l` length, `d` model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ssm_mp.config import Config, index_bits
from ssm_mp.errors import DataError
from ssm_mp.modules.layers import BlockedEmbedding, Projection
from ssm_mp.precisions.groups import unpack_reference
from ssm_mp.precisions.stored import Stored

_LOGIT_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits held at once: few enough to stay near a core, and enough that the interpreter is no burden; on a GPU, enough
to fill it."""


@dataclass(frozen=True)
class Parts:
    """Component modules by name, seen from inside one branch of the model."""

    modules: Mapping[str, nn.Module]
    prefix: str = ""

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[self.prefix + name]

    def value(self, name: str) -> Stored:
        """A component that is a bare stored value, such as `A_log`."""
        module = self[name]
        assert isinstance(module, Stored)
        return module

    def within(self, branch: str) -> Parts:
        """The same modules seen from `branch`, so that layers need not know where they stand."""
        return Parts(self.modules, f"{self.prefix}{branch}.")


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a layer carries from token to token: the convolution's last inputs `[b, K−1, I]` and the scan's state."""

    conv: Tensor
    scan: Tensor


@dataclass(frozen=True, eq=False)
class Scorer:
    """Final norm and head, for many calls; `held`: for how many tokens at most there may be logits in memory."""

    norm: nn.Module
    head: Projection
    held: int

    def nll(self, x: Tensor, columns: Tensor) -> Tensor:
        """Negative log-likelihood of the tokens in `columns [m]` of the scores of `x [m, d]`: float64 `[m]`."""
        return self.head.nll(self.norm(x), columns, self.held)

    def divergence(self, x: Tensor, columns: Tensor, reference: Scorer, expected: Tensor) -> tuple[Tensor, Tensor]:
        """`nll`, and KL(reference ‖ this) of the scores of `expected [m, d]` there, `x [m, d]` here: float64 `[m]`."""
        return self.head.divergence(self.norm(x), columns, reference.head, reference.norm(expected), self.held)


class LanguageModel(nn.Module):
    """Token ids `[b, l]` → logits `[b, l, V]`, in three stages that can be run apart: embed, layers, head."""

    def __init__(self, config: Config, parts: Parts, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = _blocked(config, parts) if config.embedding_blocks else parts["embedding"]
        self.position_embedding = None if config.max_length is None else parts["position_embedding"]
        self.layers = nn.ModuleList(layers)
        self.norm = parts["norm"]
        self.lm_head = None if config.tied else parts["lm_head"]

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Token ids `[b, l]`, the first at position `start` → `[b, l, d]`, positions added.

        Raises DataError where there are too few positions.
        """
        x: Tensor = self.embedding(ids)
        if self.position_embedding is None:
            return x
        end, most = start + ids.shape[1], self.config.max_length
        if most is not None and end > most:
            raise DataError(f"a sequence of {end} tokens, but the model has positions for {most}")
        positions: Tensor = self.position_embedding(end, start)
        return x + positions

    def scores(self, x: Tensor) -> Tensor:
        """Last hidden state `[..., d]` → logits `[..., V]` in the head's own order, which `columns` tells."""
        normed = self.norm(x)
        head = self.embedding.project if self.lm_head is None else self.lm_head
        logits: Tensor = head(normed)  # type: ignore[operator]  # nn.Module attributes are untyped
        return logits

    def scorer(self) -> Scorer:
        """`scores` for many calls: the head's weights are unpacked once."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return Scorer(self.norm, head.projection(), self.head_tokens)  # type: ignore[operator]

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
    def head_tokens(self) -> int:
        """How many tokens' logits may be held at once; at least one."""
        device = next(self.parameters()).device.type
        return max(1, _LOGIT_BYTES[device] // (4 * self.config.vocabulary))


def _blocked(config: Config, parts: Parts) -> BlockedEmbedding:
    """The token embedding of blocks; the first one says which token is in which."""
    blocks = [parts[f"embedding.blocks.{b}"] for b in range(len(config.embedding_blocks))]
    packed = blocks[0].block_of
    assert isinstance(packed, Stored)
    numbers = unpack_reference(packed.tensor(), index_bits(len(blocks)))[: config.vocabulary]
    return BlockedEmbedding(blocks, numbers)
