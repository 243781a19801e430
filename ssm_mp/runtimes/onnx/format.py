"""The ONNX format: one file that ONNX Runtime opens, a step of one token of any family, any precision of ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Arrays, Encoding, Format
from ssm_mp.runtimes.onnx.graph import build
from ssm_mp.runtimes.onnx.reading import File
from ssm_mp.runtimes.onnx.weights import kind_of, layout_of, stored_kind

LARGEST = 2_000_000_000
"""Bytes of tensors in one file: its encoding, protobuf, ends at 2 GiB, and the graph needs some room."""


class OnnxFormat(Format):
    """Every tensor of every family at its own precision."""

    word = "onnx"
    runtime = "ONNX Runtime"
    extra = "onnx"
    packages = ("onnxruntime", "onnx", "onnxscript")
    writer = ("onnx", "onnxscript")
    reader = ("onnx", "onnxruntime")
    modules = ("onnxruntime",)
    inputs = "none"
    suffix = ".onnx"
    largest_divergence = 1e-5  # far above the rounding of sums, below that of any input

    def refusal(self, config: Config) -> str | None:
        if config.embedding_blocks:
            return (
                f"the embedding is in {len(config.embedding_blocks)} blocks of rows, each with a precision of its own; "
                "leave embedding_blocks out, so that the table has one precision, or export the artifact"
            )
        return None

    def refusal_of(self, item: Exportable) -> str | None:
        found = self.refusal(item.config)
        if found is not None:
            return found
        size = sum(layout_of(p, stored_kind(stored)).bytes for p, stored in item.stored().values())
        if size > LARGEST:
            return (
                f"the tensors take {size / 1e9:.2f} GB, and one file holds {LARGEST / 1e9:.0f} GB at most; export a "
                "smaller map, or the artifact"
            )
        return None

    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        kind = kind_of(precision)
        if kind is None or any(parameter.role == "index" for parameter in component.parameters):
            return None
        layouts = [layout_of(parameter, kind) for parameter in component.parameters]
        return Encoding(layouts[0].word, sum(layout.bytes for layout in layouts))

    def write(self, item: Exportable, path: Path) -> None:
        path.write_bytes(build(item).SerializeToString())

    def expected(self, item: Exportable) -> Arrays:
        return {name: partial(_dequantised, stored) for name, (_, stored) in item.stored().items()}

    def read(self, path: Path) -> Arrays:
        return File(path).tensors()

    def tensor_bytes(self, path: Path) -> int:
        return File(path).bytes

    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        return [sys.executable, "-P", str(Path(__file__).with_name("run.py")), str(path), str(ids), str(out)]

    def command(self, path: Path, item: Exportable) -> str:
        runner, prompt = "python -m ssm_mp.runtimes.onnx.generate", "'Once upon a time'"
        if item.tokenizer is None:
            return f"{runner} {quote(str(path))} '0 1 2' 64  # it has no tokenizer: token ids"
        return f"{runner} {quote(str(path))} {prompt} 64"

    def details(self) -> Mapping[str, Any]:
        return {"provider": "CPUExecutionProvider"}


def _dequantised(stored: Stored) -> np.ndarray:
    found: np.ndarray = stored.tensor().cpu().numpy()
    return found


ONNX = OnnxFormat()
