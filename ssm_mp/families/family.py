"""What a family is: how its files are recognised, its tensors' names, and how its config is read.

A family is one file here and one line in `registry.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ssm_mp.config import Config
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig

BACKBONE = (
    (r"^(?:backbone\.)?embeddings?\.weight$", "embedding.weight"),
    (r"^(?:backbone\.)?norm_f\.", "norm."),
    (r"^(?:backbone\.)?layers\.", "layers."),
)
"""Names under `backbone.`, as the Mambas of Hugging Face and those named after them have them."""
OUTER = (
    (r"^embed_tokens\.", "embedding."),
    (r"^(?:final_layernorm|norm)\.", "norm."),
)
"""Names of what stands around the layers, in most families."""


class Family(ABC):
    """One model family. Instances have no state."""

    word: str
    """What studies, artifacts and messages call it."""
    model_types: tuple[str, ...] = ()
    """Words of `model_type` in a config that mean this family."""
    mark: str
    """Regular expression: the beginning of a name, less what wraps it, that only such a family's tensors have."""
    example: str
    """A name that has the mark, for messages."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Names in files → canonical names: regular expression and replacement, one after another."""

    def canonical_name(self, name: str) -> str:
        """The canonical name of a tensor; an unknown name stays as it is."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    plain_in_mlx: bool = True
    """Whether MLX keeps its weights as they are but for the convolutions; where it changes others too (norms with one
    added, multipliers folded in), its convolutions stay as misshapen as they are."""

    @abstractmethod
    def recognises(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names in a file, less what wraps them, are of this family, as far as names tell."""

    def layout(self, names: Iterable[str]) -> str:
        """Which of the family's ways to name tensors these names are."""
        return "huggingface"

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor in the file belongs to a part of the model that is not read, such as a vision tower."""
        return False

    def arranged(self, tensors: Mapping[str, Tensor], stored: StoredConfig) -> Mapping[str, tuple[str, Tensor]]:
        """Tensors by their canonical names, taken apart or turned as the model needs them: name → the canonical name
        that it came under, and the tensor."""
        return {name: (name, tensor) for name, tensor in tensors.items()}

    @abstractmethod
    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[Config, tuple[str, ...]]:
        """The configuration that shapes (by canonical name) and a stored config show, and notes for the user.

        Raises CheckpointError where they contradict each other or do not show enough.
        """

    @abstractmethod
    def config_from_json(self, values: dict[str, Any]) -> Config:
        """Inverse of `Config.to_json`; raises KeyError, TypeError or ValueError on foreign input."""
