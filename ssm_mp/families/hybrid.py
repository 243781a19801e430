"""The configuration of every family that transformers writes: its layers, spelt out block by block.

Dimensions: `V` vocabulary, `d` model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from ssm_mp.blocks.block import Block
from ssm_mp.blocks.registry import BLOCKS
from ssm_mp.config import Branch, Config, Part
from ssm_mp.modules.norm import NormForm

Layers = tuple[tuple[Branch, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HybridConfig(Config):
    """A language model out of any blocks; `word` is its family's.

    max_length: the longest sequence that it was trained with, where it has attention; None where it has none.
    """

    word: str
    vocabulary: int
    d_model: int
    layers: Layers
    norm: NormForm
    tied: bool
    max_length: int | None = None
    embedded_by: float = 1.0
    logits_by: float = 1.0
    embedding_blocks: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        return self.word

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def branches(self) -> Layers:
        return self.layers

    @property
    def final_norm(self) -> NormForm:
        return self.norm

    @property
    def max_tokens(self) -> int | None:
        return self.max_length

    @property
    def embedding_multiplier(self) -> float:
        return self.embedded_by

    @property
    def logit_multiplier(self) -> float:
        return self.logits_by

    def rebuilt(self, change: Callable[[Block], Block]) -> HybridConfig:
        layers = tuple(
            tuple(
                replace(branch, parts=tuple(replace(part, block=change(part.block)) for part in branch.parts))
                for branch in layer
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        del plain["word"]
        plain["layers"] = [[_branch_to_json(branch) for branch in layer] for layer in self.layers]
        return plain


def hybrid_from_json(word: str, values: dict[str, Any]) -> HybridConfig:
    """Inverse of `HybridConfig.to_json`; raises KeyError, TypeError or ValueError on foreign input."""
    layers = tuple(tuple(_branch_from_json(branch) for branch in layer) for layer in values["layers"])
    blocks = tuple(values.get("embedding_blocks", ()))
    rest = {**values, "layers": layers, "norm": NormForm(**values["norm"]), "embedding_blocks": blocks}
    return HybridConfig(word=word, **rest)


def _branch_to_json(branch: Branch) -> dict[str, Any]:
    parts = [{**asdict(part), "block": block_to_json(part.block)} for part in branch.parts]
    return {**asdict(branch), "parts": parts}


def _branch_from_json(values: dict[str, Any]) -> Branch:
    parts = tuple(Part(**{**part, "block": block_from_json(part["block"])}) for part in values["parts"])
    return Branch(**{**values, "norm": NormForm(**values["norm"]), "parts": parts})


def block_to_json(block: Block) -> dict[str, Any]:
    """A block as plain JSON values, its word included."""
    return {"word": block.word, **asdict(block)}


def block_from_json(values: dict[str, Any]) -> Block:
    """Inverse of `block_to_json`; raises KeyError or ValueError on foreign input."""
    fields = dict(values)
    found: Block = TypeAdapter(BLOCKS[fields.pop("word")]).validate_python(fields)
    return found
