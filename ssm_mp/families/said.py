"""What the `config.json` of a folder says, key by key, held against the shapes that the tensors have.

The families that transformers writes need their config: shapes do not show heads, groups, multipliers or the order of
a router's steps. Whatever shapes do show must agree with what is said.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ssm_mp.errors import CheckpointError
from ssm_mp.families.shapes import INDEX, Shapes, count_of
from ssm_mp.files.config_keys import IRRELEVANT, TIES
from ssm_mp.files.shown import listed, shown
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.files.tree import members

_BESIDE = """
model_type tie_word_embeddings hidden_act head_dim rope_scaling rope_theta rope_parameters partial_rotary_factor
attention_dropout hidden_dropout mamba_chunk_size chunk_size mamba_expand expand sliding_window num_logits_to_keep
logits_to_keep z_loss_coefficient output_router_logits router_aux_loss_coef router_jitter_noise use_mamba_kernels
mamba_hidden_act mamba_ssm_cache_dtype router_z_loss_coef input_jitter_noise embd_pdrop num_nextn_predict_layers
mtp_num_hidden_layers rescale_layers time_step_rank time_step_limit time_step_min residual_in_fp32 ep_size
"""
"""Keys that are read where they matter, and change nothing elsewhere."""


class Said:
    """A stored config beside shapes (by canonical name); remembers which keys were asked for."""

    def __init__(self, stored: StoredConfig, shapes: Shapes) -> None:
        self.stored, self.shapes = stored, shapes
        self._asked: set[str] = set()

    def shown(self, pattern: str, dimension: int) -> int | None:
        """The size that most tensors whose names fit have in a dimension; None where there is none."""
        votes = Counter(
            shape[dimension]
            for name, shape in self.shapes.items()
            if re.fullmatch(pattern, name) and len(shape) > dimension
        )
        return votes.most_common(1)[0][0] if votes else None

    def layers(self, key: str = "num_hidden_layers") -> int:
        """How many layers there are. Raises CheckpointError where the config says another number."""
        return self.size(key, count_of(self.shapes, rf"layers\.{INDEX}\.", "layer", "layers"))

    def size(
        self, key: str, shown_size: int | None = None, default: int | None = None, automatic: int | None = None
    ) -> int:
        """A whole number above 0, which must be the one that shapes show. automatic: what the word `auto` means.

        Raises CheckpointError where it is another, or neither config nor shapes have it and there is no default.
        """
        self._asked.add(key)
        said = automatic if automatic and self.stored.values.get(key) == "auto" else self.count(key)
        if said is not None and shown_size is not None and said != shown_size:
            raise self.stored.wrong(key, f"{shown_size}, as the tensors' shapes show", said)
        found = said or shown_size or default
        if found is None:
            raise self.missing(key, "a whole number above 0")
        return found

    def count(self, key: str) -> int | None:
        """A whole number above 0; None where nothing is said."""
        self._asked.add(key)
        return self.stored.count(key)

    def whole(self, key: str, default: int) -> int:
        """A whole number, 0 included."""
        self._asked.add(key)
        value = self.stored.values.get(key)
        return default if value is None else 0 if value == 0 and not isinstance(value, bool) else self.size(key)

    def number(self, key: str, default: float, most: float = 1e30) -> float:
        """A number from 0."""
        self._asked.add(key)
        found = self.stored.number((key,), most)
        return default if found is None else found

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        self._asked.add(key)
        found = self.stored.flag(key)
        return default if found is None else found

    def word(self, key: str, known: Sequence[str], default: str) -> str:
        """One of some words. Raises CheckpointError for another."""
        self._asked.add(key)
        value = self.stored.values.get(key)
        if value is None:
            return default
        if value not in known:
            raise self.stored.wrong(key, " or ".join(map(repr, known)), value)
        return str(value)

    def numbers(self, key: str, count: int, default: Sequence[float]) -> tuple[float, ...]:
        """So many numbers, of which any may be infinite."""
        self._asked.add(key)
        value = self.stored.values.get(key)
        if value is None:
            return tuple(default)
        held = [_number(one) for one in value] if isinstance(value, list | tuple) else []
        if len(held) != count or any(one is None for one in held):
            raise self.stored.wrong(key, f"{count} numbers", value)
        return tuple(one for one in held if one is not None)

    def section(self, key: str) -> Mapping[str, object]:
        """A dictionary; empty where nothing is said. Raises CheckpointError for anything else."""
        self._asked.add(key)
        value = self.stored.values.get(key)
        inside = {} if value is None else members(value)
        if inside is None:
            raise self.stored.wrong(key, "a dictionary", value)
        return {str(name): value for name, value in inside.items()}

    def kinds(self, marks: Mapping[str, str], words: Mapping[str, str], *keys: str) -> tuple[str, ...]:
        """What kind of layer each is, by the tensors that it has.

        marks: kind → regular expression of names within such a layer. words: what a config's list, under the first of
        `keys` that is there, may say → kind. Raises CheckpointError where that list says an unknown word or is of other
        layers than the tensors.
        """
        inside: list[list[str]] = [[] for _ in range(count_of(self.shapes, rf"layers\.{INDEX}\.", "layer", "layers"))]
        for name in self.shapes:
            if match := re.match(rf"layers\.{INDEX}\.", name):
                inside[int(match[1])].append(name[match.end() :])
        found = tuple(
            next((kind for kind, mark in marks.items() if any(re.match(mark, name) for name in names)), "")
            for names in inside
        )
        if "" in found:
            at = found.index("")
            raise CheckpointError(
                f"layer {at} is of no known kind: expected {', '.join(marks)}, found {listed(inside[at], 4)}"
            )
        self._compare(found, words, *keys)
        return found

    def _compare(self, found: Sequence[str], words: Mapping[str, str], *keys: str) -> None:
        """Raise CheckpointError where a config's list of layers is not that of the tensors."""
        self._asked.update(keys)
        key = next((key for key in keys if self.stored.values.get(key) is not None), None)
        if key is None:
            return
        said = self.stored.values[key]
        listed_words = list(said) if isinstance(said, list | tuple | str) else []
        unknown = [word for word in listed_words if word not in words]
        if unknown or not listed_words:
            raise self.stored.wrong(key, "a list of " + " or ".join(map(repr, words)), unknown[0] if unknown else said)
        if len(listed_words) != len(found):
            raise self.stored.wrong(key, f"{len(found)} layers, as the tensors are of", f"{len(listed_words)} layers")
        for i, (word, kind) in enumerate(zip(listed_words, found, strict=True)):
            if words[word] != kind:
                raise self.stored.wrong(f"{key}[{i}]", f"{kind!r}, as the tensors of layer {i} show", word)

    def require(self, condition: bool, key: str, expected: str, found: object) -> None:
        """Raise CheckpointError that names the key, unless something holds."""
        if not condition:
            raise self.stored.wrong(key, expected, found)

    def missing(self, key: str, expected: str) -> CheckpointError:
        """What to say of a key that is not there and that nothing else tells."""
        where = self.stored.source if self.stored.values else "config.json, which is not there"
        return CheckpointError(f"{where}: {key}: expected {expected}, found nothing; the tensors' shapes cannot tell")

    def tied(self) -> bool:
        """Whether the head is the embedding: no head in the file, and none declared."""
        self._asked.update(TIES)
        return "lm_head.weight" not in self.shapes and self.stored.flag(*TIES) is not False

    def activation(self, *known: str, key: str = "hidden_act", default: str = "silu") -> str:
        """The activation, one of those known."""
        return self.word(key, known or ("silu", "swish"), default)

    def refuse(self, key: str, why: str) -> None:
        """Raise CheckpointError where a key has a value that means something that is not computed here."""
        self._asked.add(key)
        value = self.stored.values.get(key)
        if value not in (None, False, 0, []):
            raise CheckpointError(f"{self.stored.source}: {key} = {shown(value)}: {why}")

    def closing(self, *beside: str) -> tuple[str, ...]:
        """Notes on keys that nothing asked for; `beside`: those that change nothing in this family."""
        known = self._asked | IRRELEVANT | set(_BESIDE.split()) | set(beside)
        rest = [key for key in self.stored.values if key not in known]
        notes = []
        if "lm_head.weight" in self.shapes and self.stored.flag(*TIES) is True:
            notes.append(f"{self.stored.source} ties the head, but the file holds another head; it is used")
        if rest:
            notes.append(f"{self.stored.source}: not used: {listed(rest, 8)}")
        return tuple(notes)


def _number(value: object) -> float | None:
    """A number as JSON has it: infinity is `Infinity`, `{"__float__": "Infinity"}` or a word."""
    inside = members(value)
    if inside is not None and set(inside) == {"__float__"}:
        value = inside["__float__"]
    if isinstance(value, str) and value in ("Infinity", "inf"):
        return math.inf
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
