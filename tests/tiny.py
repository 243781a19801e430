"""Tiny random models, checkpoints in every layout, and a text that they predict better than by guessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_mp.config import Config
from ssm_mp.data import Windows
from ssm_mp.families.itera import IteraConfig, IteraLayer
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build

VOCABULARY, LENGTH = 64, 16

MAMBA = MambaConfig(
    vocabulary=VOCABULARY, d_model=16, d_inner=32, d_state=4, dt_rank=2, d_conv=3, n_layers=2,
    max_length=LENGTH, norm="layer",
)  # fmt: skip
HUGGING_FACE = MambaConfig(vocabulary=VOCABULARY, d_model=16, d_inner=32, d_state=4, dt_rank=2, d_conv=4, n_layers=2)
ITERA = IteraConfig(
    vocabulary=VOCABULARY, d_model=16, max_length=LENGTH,
    layers=(IteraLayer(32, 4, 3, 24), IteraLayer(24, 5, 4, 20, experts=3), IteraLayer(32, 4, 3, 24, experts=1)),
)  # fmt: skip

MAMBAS = {
    "mamba": MAMBA,
    "huggingface": HUGGING_FACE,
    "odd": MambaConfig(
        vocabulary=VOCABULARY, d_model=21, d_inner=37, d_state=5, dt_rank=3, d_conv=3, n_layers=2, projection_bias=True
    ),
    "untied": replace(HUGGING_FACE, tied=False, d_conv=1),
}
"""Mambas of every kind: sizes that fill no vector, projections with biases, no convolution."""

CONFIGS: dict[str, Config] = {"mamba": MAMBA, "huggingface": HUGGING_FACE, "itera": ITERA}


def random_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Random canonical tensors of sensible sizes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for parameter in config.parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.kind == "A_log":
            tensors[parameter.name] = value.abs()
        elif parameter.kind == "norm" and parameter.role == "vector":
            tensors[parameter.name] = 1 + 0.1 * value
        else:
            tensors[parameter.name] = (1.0 if parameter.kind == "embedding" else 0.2) * value
    return tensors


def random_model(config: Config, seed: int = 0) -> LanguageModel:
    return build(config, random_tensors(config, seed))


def repetitive_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Runs of equal tokens: a tied random model, whose head likes the token it has just read, does well on them."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.integers(0, VOCABULARY, size=count // 8 + 1), 8)[:count].astype(np.int64)


def some_windows(count: int = 12, seed: int = 0) -> Windows:
    return Windows(torch.from_numpy(repetitive_tokens(count * LENGTH, seed).reshape(count, LENGTH)))


_RENAMES: dict[str, list[tuple[str, str]]] = {
    "canonical": [],
    "positions": [
        (r"^embedding\.", "embeddings.token_embeddings."),
        (r"^position_embedding\.", "embeddings.position_embeddings."),
        (r"^norm\.", "norm_f."),
    ],
    "huggingface": [
        (r"^embedding\.", "backbone.embeddings."),
        (r"^norm\.", "backbone.norm_f."),
        (r"^layers\.(\d+)\.ssm\.norm\.", r"backbone.layers.\1.norm."),
        (r"^layers\.(\d+)\.ssm\.", r"backbone.layers.\1.mixer."),
    ],
    "moe.moe": [(r"\.moe\.layer\.", ".moe.moe.")],
}
_RENAMES["original"] = [(r"^embedding\.", "backbone.embedding."), *_RENAMES["huggingface"]]


def in_layout(tensors: Mapping[str, Tensor], *layouts: str) -> dict[str, Tensor]:
    """Canonical tensors under the names of a layout (or several, one after another)."""
    renamed = dict(tensors)
    for layout in layouts:
        for pattern, replacement in _RENAMES[layout]:
            renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    return renamed


def write_checkpoint(path: Path, config: Config = MAMBA, seed: int = 0) -> Path:
    """A random checkpoint as `.safetensors`, canonical names."""
    save_file(random_tensors(config, seed), path)
    return path


def write_study(
    folder: Path, *, config: Config = MAMBA, extra: str = "", windows: tuple[int, int, int] = (4, 8, 16)
) -> Path:
    """A study file with its own tiny checkpoint and tokens."""
    write_checkpoint(folder / "model.safetensors", config)
    np.save(folder / "tokens.npy", repetitive_tokens(LENGTH * 120))
    calibration, search, certify = windows
    study = folder / "tiny.toml"
    study.write_text(
        f"""
[checkpoint]
path = "model.safetensors"
[data]
text = "tokens.npy"
window = {LENGTH}
calibration_windows = {calibration}
search_windows = {search}
certify_windows = {certify}
{extra}
"""
    )
    return study
