"""What a stored config says of sizes, held against the shapes, which win."""

from __future__ import annotations

import math
from typing import Protocol

from ssm_mp.files.config_keys import EPSILONS, IRRELEVANT, SIZES, TIES, USED
from ssm_mp.files.shown import listed
from ssm_mp.files.stored_config import StoredConfig


class HasSizes(Protocol):
    """A configuration whose sizes are fields named as in `SIZES`."""

    @property
    def d_model(self) -> int: ...

    @property
    def tied(self) -> bool: ...


def stated_epsilon(stored: StoredConfig) -> tuple[float | None, list[str]]:
    """The norms' epsilon that a config says, and notes; None where it says none."""
    given = {key: eps for key in EPSILONS if (eps := stored.number((key,), most=1.0)) is not None}
    if not given:
        return None, []
    said = ", ".join(f"{key} = {eps:g}" for key, eps in given.items())
    notes = [f"{stored.source} says {said}; the first is used"] if len(set(given.values())) > 1 else []
    return next(iter(given.values())), notes


def declares_untied(stored: StoredConfig) -> bool:
    """Whether the config says that the head is a matrix of its own."""
    return stored.flag(*TIES) is False


def compared(config: HasSizes, stored: StoredConfig) -> tuple[list[str], set[str]]:
    """A note for each size that the shapes contradict, and the keys that nothing uses."""
    notes = []
    unused = stored.values.keys() - USED
    for field, keys in SIZES.items():
        held = _sizes(config, field)
        for key in keys:
            if key == "max_length" and "model_type" in stored.values:
                continue  # Hugging Face's own is of generation
            automatic = field == "dt_rank" and stored.values.get(key) == "auto"
            value = math.ceil(config.d_model / 16) if automatic else stored.count(key)
            if value is None:
                continue
            if not held:
                unused.add(key)
            elif value not in held and not _padded(stored, key, value, max(held)):
                shapes = " and ".join(map(str, sorted(held)))
                notes.append(f"{stored.source} says {key} = {value}, the shapes say {shapes}; the shapes win")
    return notes, unused


def _sizes(config: HasSizes, field: str) -> set[int]:
    """The sizes of a model, or of its layers, that a field has."""
    value = getattr(config, field, None)
    if value is not None:
        return {value}
    return {getattr(layer, field) for layer in getattr(config, "layers", ()) if hasattr(layer, field)}


def _padded(stored: StoredConfig, key: str, value: int, held: int) -> bool:
    """Whether a vocabulary is larger by what it was padded to, as the original repository does."""
    multiple = stored.count("pad_vocab_size_multiple")
    return key == "vocab_size" and multiple is not None and -(-value // multiple) * multiple == held


def closing_notes(config: HasSizes, stored: StoredConfig, unused: set[str]) -> list[str]:
    """Notes on what is said of biases and the head and is not so, and on keys that nothing uses."""
    notes = []
    for field, *keys in (("conv_bias", "use_conv_bias"), ("projection_bias", "use_bias", "bias")):
        if getattr(config, field, False) and stored.flag(*keys, field) is False:
            notes.append(f"{stored.source} says that there is no {field}, but the file holds it; it is used")
    if not config.tied and stored.flag(*TIES) is True:
        notes.append(f"{stored.source} ties the head, but the file holds another head; it is used")
    rest = [key for key in stored.values if key in unused and key not in IRRELEVANT]
    if rest:
        notes.append(f"{stored.source}: not used: {listed(rest, 8)}")
    return notes
