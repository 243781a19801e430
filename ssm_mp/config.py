"""What a model is made of: a list of layers, each a list of residual branches, each one or several blocks in parallel.

Dimensions: `V` vocabulary, `T` positions, `d` model.

A configuration is the single source of what tensors a checkpoint must hold, which component each belongs to and how it
is quantised; the checkpoint reader, the component list, the converter and the artifact loader all ask
`config.parameters()`. The configurations themselves are the families' (`families/`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from ssm_mp.blocks.block import Block
from ssm_mp.modules.embedding import PositionForm, embedding_parameters
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter, weight


@dataclass(frozen=True)
class Part:
    """One block of a branch: its name within the layer, and what its inputs and outputs are multiplied with."""

    name: str
    block: Block
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class Branch:
    """A residual branch: `x + residual · Σ after · block(before · norm(x))`; `norm_name` is within the layer."""

    norm_name: str
    norm: NormForm
    parts: tuple[Part, ...]
    residual: float = 1.0


class Config(ABC):
    """A language model's configuration; frozen dataclasses, one or a few a family.

    embedding_blocks: rows of each block that the token embedding is split into; empty where it is whole.
    """

    vocabulary: int
    d_model: int
    n_layers: Any  # a field or a property
    tied: bool
    embedding_blocks: tuple[int, ...]

    @property
    @abstractmethod
    def family(self) -> str:
        """The family's word."""

    @property
    @abstractmethod
    def branches(self) -> tuple[tuple[Branch, ...], ...]:
        """Of each layer, its residual branches in order."""

    @property
    @abstractmethod
    def final_norm(self) -> NormForm:
        """The norm before the head."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without the family."""

    def rebuilt(self, change: Callable[[Block], Block]) -> Config:
        """The same with other blocks, in families that have a choice of them; in others it stays as it is."""
        return self

    def replaced(self, **changes: Any) -> Self:
        """The same with other values of some fields."""
        return replace(self, **changes)  # type: ignore[type-var]  # every configuration is a dataclass

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that it has positions for, or was trained with where it has attention; None: any."""
        return None

    @property
    def limit(self) -> str:
        """What `max_tokens` is, in words: "the model has positions for 128 tokens"."""
        if self.position_table is not None:
            return f"the model has positions for {self.max_tokens} tokens"
        return f"the model was trained with at most {self.max_tokens} tokens at once"

    @property
    def position_table(self) -> int | None:
        """Rows of the learned positions; None where there are none."""
        return None

    @property
    def embedding_multiplier(self) -> float:
        """What embedded tokens are multiplied with."""
        return 1.0

    @property
    def logit_multiplier(self) -> float:
        """What logits are multiplied with."""
        return 1.0

    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor of the model, canonical names, in the order of the data flow."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[Parameter]:
        d = self.d_model
        yield from embedding_parameters(self.vocabulary, d, self.tied, self.embedding_blocks)
        if self.position_table is not None:
            yield weight("position_embedding", "position_embedding", None, PositionForm(), self.position_table, d)
        for i, branches in enumerate(self.branches):
            for branch in branches:
                yield from branch.norm.parameters(f"layers.{i}.{branch.norm_name}", i, d)
                for part in branch.parts:
                    yield from part.block.parameters(f"layers.{i}.{part.name}", i)
        yield from self.final_norm.parameters("norm", None, d)
        if not self.tied:
            yield weight("lm_head", "lm_head", None, LinearForm(), self.vocabulary, d)

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Tensors that a checkpoint may hold but the forward pass does not use: name → shape."""
        return {}
