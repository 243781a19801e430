"""Mixed precision for state-space language models: checkpoints, components, conversion, evaluation, artifacts.

from ssm_mp import load_model, find_components, PrecisionMap, convert, evaluate, load_artifact
"""

from __future__ import annotations

from pathlib import Path

from ssm_mp.artifact import Artifact, load_artifact, read_artifact, save_artifact
from ssm_mp.benchmark import Benchmark, benchmark
from ssm_mp.calibrate import calibrate
from ssm_mp.checkpoint import Checkpoint, load_checkpoint
from ssm_mp.components import Component, find_components
from ssm_mp.convert import Converter, Scheme, convert
from ssm_mp.data import Splits, Windows
from ssm_mp.errors import SsmMpError
from ssm_mp.evaluate import Evaluation, evaluate, paired_increase
from ssm_mp.models import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.quantize import ScaleRule

__all__ = [
    "Artifact", "Benchmark", "Checkpoint", "Component", "Converter", "Evaluation", "LanguageModel", "PrecisionMap",
    "ScaleRule", "Scheme", "Splits", "SsmMpError", "Windows", "benchmark", "calibrate", "convert", "evaluate",
    "find_components", "load_artifact", "load_checkpoint", "load_model", "paired_increase", "read_artifact",
    "save_artifact",
]  # fmt: skip


def load_model(path: str | Path) -> LanguageModel:
    """The FP32 model of a checkpoint: token ids `[b, l]` → logits `[b, l, V]`, eval mode.

    >>> import torch
    >>> from ssm_mp import load_model
    >>> load_model("studies/reference/model.safetensors")(torch.zeros(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 8000])
    """
    checkpoint = load_checkpoint(path)
    return build(checkpoint.config, checkpoint.tensors)
