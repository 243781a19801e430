"""Checkpoints that tests write: a tiny Hugging Face Mamba under any names, in any file or folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import HUGGING_FACE, in_layout, random_tensors


def hugging_face(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a tiny Mamba under Hugging Face names."""
    return in_layout(random_tensors(HUGGING_FACE, seed), "huggingface")


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def write(path: Path, content: object) -> Path:
    """Write a file in the format that its suffix says."""
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(content, path)
    return path


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], stem: str = "model", suffix: str = ".safetensors"
) -> dict[str, str]:
    """Two shards and their index; the index's map, tensor → shard, is the answer."""
    names = sorted(tensors)
    shards = {f"{stem}-0000{i}-of-00002{suffix}": held for i, held in ((1, names[:7]), (2, names[7:]))}
    for shard, held in shards.items():
        write(folder / shard, {name: tensors[name] for name in held})
    placed = {name: shard for shard, held in shards.items() for name in held}
    write_index(folder, placed, stem, suffix)
    return placed


def write_index(folder: Path, placed: Mapping[str, object], stem: str = "model", suffix: str = ".safetensors") -> None:
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
