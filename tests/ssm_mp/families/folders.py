"""Folders of the tiny models with something changed in them, and what reading them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.errors import CheckpointError
from tests.families.tiny_models import CASES, Case, written

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}

Tensors = dict[str, Tensor]


def folder_of(
    name: str, path: Path, config: dict[str, Any] | None = None, turned: Callable[[Tensors], Tensors] | None = None
) -> Path:
    """A case's folder with other values of some keys (None takes a key away) and with its tensors turned."""
    folder = written(BY_NAME[name], path / "model")
    if config:
        values = {**json.loads((folder / "config.json").read_text()), **config}
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
    if turned is not None:
        tensors = turned(load_file(folder / "model.safetensors"))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def error_of(folder: Path) -> str:
    """What reading the folder says, which is an error and not too long."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def require_refused(folder: Path, key: str, *parts: str) -> None:
    """The folder is refused in one line that names config.json, the key, what was expected and what was found."""
    said = error_of(folder)
    assert "\n" not in said, said
    for part in ("config.json", key, "expected", "found", *parts):
        assert part in said, said


def require_equal(found: Checkpoint, expected: Checkpoint) -> None:
    """Two checkpoints of one model."""
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
