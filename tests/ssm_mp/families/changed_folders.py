"""Folders that transformers wrote, changed in one thing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.tiny_models import CASES, written

BY_NAME = {case.name: case for case in CASES}
Tensors = dict[str, Tensor]


@cache
def held(name: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A case's config and tensors as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        at = written(BY_NAME[name], Path(folder))
        return json.loads((at / "config.json").read_text()), load_file(at / "model.safetensors")


def changed(
    name: str, folder: Path, config: Mapping[str, Any] | None = None, tensors: Callable[[Tensors], Tensors] = dict
) -> Path:
    """A case's folder with other values of some keys (None: without the key) and other tensors."""
    values = {**held(name)[0], **(config or {})}
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    save_file(tensors(dict(held(name)[1])), folder / "model.safetensors")
    return folder


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models have equal tensors under equal names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
