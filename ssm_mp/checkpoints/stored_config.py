"""What a stored config says, and what becomes of it: used, compared with the shapes, refused or noted.

The keys are named in `config_keys.py` only. Shapes win over a stored size; a value of a type that its
key cannot have is an error that names file, key, what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssm_mp.checkpoints.config_keys import (
    ACTIVATIONS,
    EPSILONS,
    IRRELEVANT,
    ONLY_MAMBA,
    PACKED,
    SIZES,
    TIES,
    TOP_KS,
    USED,
)
from ssm_mp.checkpoints.shown import listed, shown
from ssm_mp.checkpoints.tree import key_name, members
from ssm_mp.config import Config, IteraConfig, MambaConfig
from ssm_mp.errors import CheckpointError

_HOLDERS = ("config", "model_config", "hyper_parameters", "hparams", "model_args", "args", "cfg")
"""Keys under which a file keeps its config beside the weights, the first that is there taken."""


@dataclass(frozen=True)
class StoredConfig:
    """A config as it was stored, and where: `source` is for messages."""

    source: str
    values: Mapping[str, object]

    def number(self, keys: Iterable[str], most: float) -> float | None:
        """The first of `keys` that is given, a number from 0 to `most`. Raises CheckpointError for another value."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise self.wrong(key, f"a number from 0 to {most:g}", value)
            return float(value)
        return None

    def count(self, key: str) -> int | None:
        """A whole number above 0 and below 2^63. Raises CheckpointError for another value."""
        value = self.values.get(key)
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 0 < value < 1 << 63:  # type: ignore[operator]
            raise self.wrong(key, "a whole number above 0", value)
        return int(value)  # type: ignore[call-overload, no-any-return]

    def flag(self, *keys: str) -> bool | None:
        """The first of `keys` that is given, true or false. Raises CheckpointError for another value."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, bool):
                raise self.wrong(key, "true or false", value)
            return value
        return None

    def wrong(self, key: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key}: expected {expected}, found {shown(found)}")


def config_within(content: object, source: str) -> StoredConfig:
    """The config that a file holds beside its weights; empty where there is none."""
    inside = members(content) or {}
    for key in _HOLDERS:
        values = _plain(inside.get(key))
        if values:
            return StoredConfig(f"{key} in {source}", values)
    return StoredConfig(source, {})


def config_of(content: Mapping[str, object], source: str) -> StoredConfig:
    """The config of a JSON file's content."""
    return StoredConfig(source, _plain(content))


def refuse_quantised(stored: StoredConfig) -> None:
    """Raise CheckpointError where the config says that the weights are quantised."""
    for key in PACKED:
        value = stored.values.get(key)
        inside = members(value)
        if value is not None and value is not False and (inside is None or inside):
            method = None if inside is None else inside.get("quant_method")
            by = f" by {shown(method)}" if isinstance(method, str) else ""
            raise CheckpointError(
                f"{stored.source}: {key} says that the weights are already quantised{by}; such a checkpoint cannot be "
                "searched, give the float checkpoint that it was made from"
            )


def with_stored(config: Config, stored: StoredConfig) -> tuple[Config, tuple[str, ...]]:
    """The config with what shapes cannot show taken from the stored one, and notes on all else that it says."""
    notes, unused = _compared(config, stored)
    if isinstance(config, MambaConfig):
        config = _declared(config, stored)
    else:
        config = replace(config, tied=config.tied and not declares_untied(stored))
        config, more = _with_top_k(config, stored)
        notes += more
        unused |= stored.values.keys() & ONLY_MAMBA
    config, more = _with_epsilon(config, stored)
    notes += more
    for field, *keys in (("conv_bias", "use_conv_bias"), ("projection_bias", "use_bias", "bias")):
        if getattr(config, field, False) and stored.flag(*keys, field) is False:
            notes.append(f"{stored.source} says that there is no {field}, but the file holds it; it is used")
    if not config.tied and stored.flag(*TIES) is True:
        notes.append(f"{stored.source} ties the head, but the file holds another head; it is used")
    rest = [key for key in stored.values if key in unused and key not in IRRELEVANT]
    if rest:
        notes.append(f"{stored.source}: not used: {listed(rest, 8)}")
    return config, tuple(notes)


def _with_epsilon(config: Config, stored: StoredConfig) -> tuple[Config, list[str]]:
    given = {key: eps for key in EPSILONS if (eps := stored.number((key,), most=1.0)) is not None}
    if not given:
        return config, []
    said = ", ".join(f"{key} = {eps:g}" for key, eps in given.items())
    notes = [f"{stored.source} says {said}; the first is used"] if len(set(given.values())) > 1 else []
    return replace(config, norm_eps=next(iter(given.values()))), notes


def declares_untied(stored: StoredConfig) -> bool:
    """Whether the config says that the head is a matrix of its own."""
    return stored.flag(*TIES) is False


def _compared(config: Config, stored: StoredConfig) -> tuple[list[str], set[str]]:
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
    expand = stored.number(("expand",), most=1 << 20)
    if expand is not None and isinstance(config, MambaConfig) and int(expand * config.d_model) != config.d_inner:
        said = f"expand = {expand:g} of {config.d_model}"
        notes.append(f"{stored.source} says {said}, the shapes say {config.d_inner}; the shapes win")
    return notes, unused


def _sizes(config: Config, field: str) -> set[int]:
    """The sizes of a model, or of its layers, that a field has."""
    value = getattr(config, field, None)
    if value is not None:
        return {value}
    return {getattr(layer, field) for layer in getattr(config, "layers", ()) if hasattr(layer, field)}


def _padded(stored: StoredConfig, key: str, value: int, held: int) -> bool:
    """Whether a vocabulary is larger by what it was padded to, as the original repository does."""
    multiple = stored.count("pad_vocab_size_multiple")
    return key == "vocab_size" and multiple is not None and -(-value // multiple) * multiple == held


def _declared(config: MambaConfig, stored: StoredConfig) -> MambaConfig:
    """The config with the head and biases that a Hugging Face config declares, so that their absence is reported.

    Raises CheckpointError for another model type or activation, and for layers of another kind.
    """
    kind = stored.values.get("model_type")
    if kind not in (None, "mamba"):
        raise CheckpointError(
            f"{stored.source} says model_type = {shown(kind)}; only 'mamba' (Mamba-1) has this forward pass"
        )
    for key in ACTIVATIONS:
        activation = stored.values.get(key)
        if activation not in (None, "silu", "swish"):
            raise CheckpointError(f"{stored.source} says {key} = {shown(activation)}; only 'silu' is supported")
    block = members(stored.values.get("ssm_cfg")) or {}
    if block.get("layer") not in (None, "Mamba1", "Mamba"):
        raise CheckpointError(f"{stored.source} says ssm_cfg.layer = {shown(block['layer'])}; only 'Mamba1' is read")
    attention = stored.values.get("attn_layer_idx")
    if attention is not None and not (isinstance(attention, list | tuple) and not attention):
        raise CheckpointError(f"{stored.source} says attn_layer_idx: attention layers are not read")
    rms = stored.flag("rms_norm")
    if rms is not None and rms != (config.norm == "rms"):
        norm = "an RMSNorm" if rms else "a LayerNorm"
        raise CheckpointError(f"{stored.source} says rms_norm = {rms}: {norm}, which the norms in the file are not")
    conv_bias, projection_bias = stored.flag("use_conv_bias", "conv_bias"), stored.flag("use_bias", "bias")
    if conv_bias is None:
        conv_bias = kind is not None  # Hugging Face's default is that there is one
    return replace(
        config,
        tied=config.tied and not declares_untied(stored),
        conv_bias=config.conv_bias or conv_bias,
        projection_bias=config.projection_bias or projection_bias is True,
    )


def _with_top_k(config: IteraConfig, stored: StoredConfig) -> tuple[IteraConfig, list[str]]:
    key = next((key for key in TOP_KS if stored.values.get(key) is not None), None)
    top_k = None if key is None else stored.count(key)
    if top_k is None:
        return config, []
    fewest = min((layer.experts for layer in config.layers if layer.experts), default=top_k)
    notes = []
    if top_k > fewest:
        notes = [f"{stored.source} says {key} = {top_k}, but a layer has {fewest} experts; it uses them all"]
    return replace(config, top_k=top_k), notes


def _plain(values: object) -> dict[str, Any]:
    """A config's entries by name, out of a dictionary or an object of an unknown class, which may wrap each value.

    OmegaConf keeps entries in `_content` and a value in `_val`; transformers writes an infinity as
    `{"__float__": "Infinity"}`.
    """
    inside = members(values) or {}
    content = members(inside.get("_content"))
    entries = inside if content is None else content
    named = {name: _value(value) for key, value in entries.items() if (name := key_name(key)) is not None}
    section = members(named.get("model"))  # as in {"model": {…}, "training": {…}}
    if section is not None and not named.keys() & USED:
        named = {name: _value(value) for key, value in section.items() if (name := key_name(key)) is not None}
    block = members(named.get("ssm_cfg")) or {}  # the original repository's sizes of a layer
    named |= {name: block[name] for name in block if isinstance(name, str) and name != "layer" and name not in named}
    return {name: value for name, value in named.items() if not name.startswith("__")}


def _value(value: object) -> object:
    inside = members(value)
    if inside is None:
        return value.item() if isinstance(value, np.generic) else value
    if "_val" in inside:
        return inside["_val"]
    if set(inside) == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}.get(str(inside["__float__"]), math.nan)
    return value
