"""Every export format by name. Imports no torch, so that a study file is read quickly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ssm_mp.errors import ExportError

if TYPE_CHECKING:
    from ssm_mp.runtimes.format import Format

FORMATS: dict[str, str] = {
    "onnx": "ssm_mp.runtimes.onnx.format:ONNX",
}
"""Name → "file:instance", the most used first."""


def get_format(name: str) -> Format:
    """The format of a name; raises ExportError with the known names."""
    if name not in FORMATS:
        raise ExportError(f"unknown format {name!r}; known are {', '.join(map(repr, FORMATS))}")
    file, _, instance = FORMATS[name].partition(":")
    found: Format = getattr(import_module(file), instance)
    return found
