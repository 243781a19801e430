"""What stands for an object in a pickle whose class is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Record:
    """An inert object: its class by name, `models.config.IteraLiteConfig`, and the fields that it was saved with.

    A dict's items and an object's attributes are fields by name; positional arguments are "0", "1", …; what a list
    holds is "items", a state without names "state". A tensor that is not dense (sparse, quantised, on the meta device)
    has the kind of the call that makes it, `torch._utils._rebuild_qtensor`, and its "shape". An object that holds
    itself has no fields where it does.
    """

    kind: str
    fields: Mapping[str, object]
