"""What stands for an object in a pickle whose class is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Record:
    """An inert object: its class by name, `models.config.IteraLiteConfig`, and the fields that it was saved with."""

    kind: str
    fields: Mapping[str, object]
