"""Every export format by name. Imports no torch, so that a study file is read quickly."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ssm_mp.errors import ExportError
from ssm_mp.scheme import ActivationScheme

if TYPE_CHECKING:
    from ssm_mp.runtimes.format import Format


@dataclass(frozen=True)
class Home:
    """Where a format is, "file:instance", and how its runtime rounds the inputs of products."""

    instance: str
    inputs: ActivationScheme = "none"


FORMATS = {
    "gguf": Home("ssm_mp.runtimes.gguf.format:GGUF", inputs="blocks"),
    "mlx": Home("ssm_mp.runtimes.mlx.format:MLX"),
    "compressed-tensors": Home("ssm_mp.runtimes.compressed_tensors.format:COMPRESSED_TENSORS"),
    "onnx": Home("ssm_mp.runtimes.onnx.format:ONNX"),
}
"""Every format's home, the most used first."""


def get_format(name: str) -> Format:
    """The format of a name; raises ExportError with the known names."""
    if name not in FORMATS:
        raise ExportError(f"unknown format {name!r}; known are {', '.join(map(repr, FORMATS))}")
    file, _, instance = FORMATS[name].instance.partition(":")
    found: Format = getattr(import_module(file), instance)
    return found
