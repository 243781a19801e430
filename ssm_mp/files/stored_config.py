"""What a stored config says, and what becomes of it: used, compared with the shapes, refused or noted.

The keys are named in `config_keys.py` only. Shapes win over a stored size; a value of a type that its
key cannot have is an error that names file, key, what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_mp.errors import CheckpointError
from ssm_mp.files.config_keys import (
    PACKED,
    USED,
)
from ssm_mp.files.shown import shown
from ssm_mp.files.tree import key_name, members

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
