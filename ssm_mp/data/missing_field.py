"""What is said where a record of a text does not have the field that the study names."""

from __future__ import annotations

from collections.abc import Iterable

from ssm_mp.errors import DataError

_SHOWN = 8
"""Names that there are instead, of many."""


def missing_field(where: str, kind: str, field: str, there: Iterable[str]) -> DataError:
    """The error; kind: what such a field is called there."""
    known = ", ".join(repr(name) for name in list(there)[:_SHOWN])
    return DataError(
        f'{where}: no {kind} {field!r}; there are {known or "none"}. Say which holds the text: [data] text_field = "…"'
    )
