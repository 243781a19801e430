"""One tiny model a family, and some in other groups: what goes through the whole line, from conversion to export."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.conversion.regroup import Grouping, regrouped
from ssm_mp.data import Windows
from ssm_mp.model import LanguageModel, build
from tests.families.tiny_models import CASES, VOCABULARY, written
from tests.tiny import HUGGING_FACE, ITERA, write_checkpoint

_CASES = {case.name: case for case in CASES}
_CONFIGS = {"mamba": HUGGING_FACE, "itera": ITERA}
LENGTH = 24


@dataclass(frozen=True)
class Model:
    """A model of `tiny_models` or `tiny` by its name there, and how its components are grouped."""

    source: str
    experts: Grouping | None = None
    split: tuple[str, ...] = ()


def _model(source: str, experts: Grouping | None = None, split: tuple[str, ...] = ()) -> tuple[str, Model]:
    return "-".join((source, *([experts] if experts else []), *(["split"] if split else []))), Model(
        source, experts, split
    )


PLAIN: dict[str, Model] = dict(
    map(
        _model,
        (
            "mamba", "itera", "mamba2/groups-2", "falcon_mamba/plain", "bamba/plain", "granitemoehybrid/dense",
            "nemotron_h/dense", "falcon_h1/norm-then-gate", "jamba/dense", "lfm2/plain", "qwen3_5_text/plain",
            "qwen3_5/text-and-vision", "granitemoehybrid/experts", "nemotron_h/experts", "jamba/experts",
            "lfm2_moe/plain", "qwen3_next/plain", "qwen3_5_moe_text/plain", "qwen3_5_moe/text-and-vision",
        ),
    )
)  # fmt: skip
"""One or two a family, as they are read."""
GROUPED: dict[str, Model] = dict(
    (
        _model("itera", "together"),
        _model("granitemoehybrid/experts", "together", ("in_proj",)),
        _model("granitemoehybrid/many-experts"),
        _model("granitemoehybrid/many-experts", "each"),
        _model("nemotron_h/experts-latent", "together"),
        _model("lfm2_moe/plain", "together"),
        _model("qwen3_next/many-experts"),
        _model("mamba2/biases", split=("in_proj",)),
        _model("falcon_h1/biases", split=("in_proj",)),
    )
)
"""Experts that are one component or one each, against what is the default; in_proj by its rows."""
MODELS = {**PLAIN, **GROUPED}
QUICK = ("itera", "mamba2/groups-2", "granitemoehybrid/experts", "lfm2/plain", "qwen3_5_text/plain")
every_model = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
"""A test of each of them; a developer's loop has those that have every block between them."""


@cache
def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of one of `MODELS`, read from a file and grouped."""
    model = MODELS[name]
    with TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(checkpoint_file(model.source, Path(folder)))
    return regrouped(checkpoint, model.experts, model.split)


def checkpoint_file(source: str, folder: Path) -> Path:
    """A model's checkpoint in a folder, as people have it; its path."""
    if source in _CONFIGS:
        return write_checkpoint(folder / "model.safetensors", _CONFIGS[source])
    return written(_CASES[source], folder)


def fp32_of(name: str) -> LanguageModel:
    """A new FP32 model of one of `MODELS`."""
    checkpoint = checkpoint_of(name)
    return build(checkpoint.config, {key: tensor.clone() for key, tensor in checkpoint.tensors.items()})


def text_of(vocabulary: int, count: int, seed: int = 0) -> np.ndarray:
    """Tokens of an uneven distribution, `[count]` int64: some occur often, most hardly ever."""
    shares = 1.0 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(seed).choice(vocabulary, size=count, p=shares / shares.sum()).astype(np.int64)


def windows_of(name: str, count: int = 6, seed: int = 0, length: int | None = None) -> Windows:
    """Windows for one of `MODELS`, as long as `length` or as its positions allow."""
    config = checkpoint_of(name).config
    length = length or min(LENGTH, config.max_tokens or LENGTH)
    return Windows(torch.from_numpy(text_of(config.vocabulary, count * length, seed).reshape(count, length)))


def write_family_study(
    folder: Path, source: str, extra: str = "", windows: tuple[int, int, int] = (4, 6, 8), length: int = LENGTH
) -> Path:
    """A study file of a family's checkpoint and its own text of token ids; models are random, so it is forced."""
    (folder / "model").mkdir()
    file = checkpoint_file(source, folder / "model")
    vocabulary = _CONFIGS[source].vocabulary if source in _CONFIGS else VOCABULARY
    np.save(folder / "tokens.npy", text_of(vocabulary, length * 100))
    calibration, search, certify = windows
    study = folder / "family.toml"
    study.write_text(
        f"""
[checkpoint]
path = "{file.relative_to(folder)}"
[data]
text = "tokens.npy"
window = {length}
calibration_windows = {calibration}
search_windows = {search}
certify_windows = {certify}
[search]
force_baseline = true
sampler = "random"
trials = 4
seeds = 2
budget_percent = 1000
probe = "gradient"
{extra}
"""
    )
    return study


def off(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
