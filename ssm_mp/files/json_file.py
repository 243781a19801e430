"""Read one JSON file that stands beside weights: a config, or an index of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssm_mp.errors import CheckpointError
from ssm_mp.files.refused import foreign_file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, UTF-8 with or without its mark. Raises CheckpointError for anything else."""
    try:
        raw = path.read_bytes()
        foreign = foreign_file(path, raw[:512])
        if foreign is not None:
            raise CheckpointError(f"{path}: {foreign}")
        content = json.loads(raw.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
