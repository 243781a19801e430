"""Models of four sizes to measure on: the reference, a 130-million-parameter Mamba, and two between.

The reference is the trained checkpoint; the others have the random weights that training a Mamba begins with. How fast
a model runs does not depend on its weights; its perplexity means nothing.

Dimensions: `I` inner, `N` state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.huggingface import REFERENCE
from search.problem.space import make_space
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, plan_of
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.data import Splits, Windows
from ssm_mp.families.itera import IteraConfig
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import build
from ssm_mp.precision_map import pinned_names

STUDY = Path("studies/reference.toml")
LENGTH = 128
_CALIBRATION_WINDOWS = 8

RANDOM = {
    "8 layers of 256": MambaConfig(16000, 256, 512, 16, 16, 4, 8),
    "16 layers of 512": MambaConfig(32000, 512, 1024, 16, 32, 4, 16),
    "130m": MambaConfig(50280, 768, 1536, 16, 48, 4, 24),
}
"""Sizes that have no checkpoint here; `130m` is that of state-spaces/mamba-130m."""

NAMES = ("reference", *RANDOM)


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of one of `NAMES`."""
    if name == "reference":
        return load_checkpoint(REFERENCE)
    return Checkpoint(Path(name), "canonical", RANDOM[name], initial_tensors(RANDOM[name]))


def initial_tensors(config: MambaConfig | IteraConfig, seed: int = 0) -> dict[str, Tensor]:
    """Mamba's initialisation (Gu & Dao 2023, section 3.6; `_init_weights` of mamba_ssm): step sizes in [0.001, 0.1],
    A = −(1 … N), D = 1, output projections divided by √layers.

    `transformers` starts with weights several times as large, under which rounding grows from layer to layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def initial(kind: str, role: str, shape: tuple[int, ...]) -> Tensor:
        if kind == "A_log":
            return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape).clone()  # [I, N] or [N]
        if kind == "D" or role == "vector":
            return torch.ones(shape)
        if kind in ("dt_proj", "delta_proj") and role == "bias":
            step = torch.exp(torch.rand(shape, generator=generator) * math.log(100.0) + math.log(0.001))
            return step + torch.log(-torch.expm1(-step))  # inverse of softplus
        if role == "bias":
            return torch.zeros(shape)
        std = 0.02 if kind in ("embedding", "position_embedding") else 1 / math.sqrt(3 * math.prod(shape[1:]))
        std /= math.sqrt(config.n_layers) if kind in ("out_proj", "w2") else 1
        return torch.randn(shape, generator=generator) * std

    return {p.name: initial(p.kind, p.role, p.shape) for p in config.parameters()}


def random_windows(vocabulary: int, count: int, length: int, seed: int = 0) -> Windows:
    """Windows of tokens drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(0, vocabulary, (count, length), generator=generator))


def workspace_of(checkpoint: Checkpoint, windows: int, overrides: Iterable[str] = ()) -> Workspace:
    """A study of `checkpoint` on windows of random tokens; all else as in the reference study, but for `overrides`."""
    spec = load_spec(STUDY, overrides)
    vocabulary = checkpoint.config.vocabulary
    calibration, search, certify = (
        random_windows(vocabulary, count, LENGTH, seed)
        for seed, count in enumerate((_CALIBRATION_WINDOWS, windows, windows))
    )
    counts = torch.bincount(calibration.ids.flatten(), minlength=vocabulary)
    device = spec.search.device
    model = build(checkpoint.config, {name: tensor.to(device) for name, tensor in checkpoint.tensors.items()})
    model = split_embedding(model, counts, spec.precision.embedding_blocks)
    statistics = calibrate(model, calibration) if spec.precision.activations == "static" else None
    converter = Converter(model, spec.precision.scheme, statistics)
    space = make_space(converter, spec.precision.choices, pinned_names(converter.components))
    splits = Splits(calibration, search, certify, counts)
    return Workspace(spec, checkpoint, model, splits, converter, space, plan_of(spec, checkpoint))
