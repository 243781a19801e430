"""Read one JSON file that stands beside weights: a config, or an index of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssm_mp.errors import CheckpointError
from ssm_mp.files.refused import foreign_file
from ssm_mp.files.shown import shown, shown_name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, UTF-8 with or without its mark.

    Raises CheckpointError for anything else, and for one that says two things under one key.
    """
    try:
        raw = path.read_bytes()
        foreign = foreign_file(path, raw[:512])
        if foreign is not None:
            raise CheckpointError(f"{path}: {foreign}")
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError where a key comes twice with different values."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and content[key] != value:
            raise ValueError(f"{shown_name(key)} is there twice, as {shown(content[key])} and as {shown(value)}")
        content[key] = value
    return content
