"""Mixed precision for state-space language models: checkpoints, components, conversion, evaluation, artifacts.

from ssm_mp import load_model, find_components, PrecisionMap, convert, evaluate, load_artifact

A public name is loaded on first use, so that what needs no torch (errors, schemes, study files) imports none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssm_mp.artifact import Artifact, load_artifact, read_artifact, save_artifact
    from ssm_mp.checkpoints import Checkpoint, load_checkpoint
    from ssm_mp.components import Component, find_components
    from ssm_mp.conversion.calibrate import calibrate
    from ssm_mp.conversion.convert import Converter, convert
    from ssm_mp.data import Splits, Windows
    from ssm_mp.decoding.decode import generate, prefill, step
    from ssm_mp.errors import SsmMpError
    from ssm_mp.evaluation.benchmark import Benchmark, benchmark
    from ssm_mp.evaluation.drift import drift
    from ssm_mp.evaluation.evaluate import Evaluation, evaluate, paired_increase
    from ssm_mp.model import LanguageModel
    from ssm_mp.precision_map import PrecisionMap
    from ssm_mp.scheme import ScaleRule, Scheme

__all__ = [
    "Artifact", "Benchmark", "Checkpoint", "Component", "Converter", "Evaluation", "LanguageModel", "PrecisionMap",
    "ScaleRule", "Scheme", "Splits", "SsmMpError", "Windows", "benchmark", "calibrate", "convert", "drift",
    "evaluate", "find_components", "generate", "load_artifact", "load_checkpoint", "load_model", "paired_increase",
    "prefill", "read_artifact", "save_artifact", "step",
]  # fmt: skip

_HOMES = {
    "artifact": ("Artifact", "load_artifact", "read_artifact", "save_artifact"),
    "evaluation.benchmark": ("Benchmark", "benchmark"),
    "conversion.calibrate": ("calibrate",),
    "checkpoints": ("Checkpoint", "load_checkpoint"),
    "components": ("Component", "find_components"),
    "conversion.convert": ("Converter", "convert"),
    "data": ("Splits", "Windows"),
    "decoding.decode": ("generate", "prefill", "step"),
    "evaluation.drift": ("drift",),
    "errors": ("SsmMpError",),
    "evaluation.evaluate": ("Evaluation", "evaluate", "paired_increase"),
    "model": ("LanguageModel",),
    "precision_map": ("PrecisionMap",),
    "scheme": ("ScaleRule", "Scheme"),
}
"""The public names that each file or folder of the package defines."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package itself, whose public names are loaded on first use."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = getattr(import_module(f"{self.__name__}.{_HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> Iterable[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package


def load_model(path: str | Path) -> LanguageModel:
    """The FP32 model of a checkpoint: token ids `[b, l]` → logits `[b, l, V]`, eval mode.

    >>> import torch
    >>> from ssm_mp import load_model
    >>> load_model("studies/reference/model.safetensors")(torch.zeros(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 8000])
    """
    from ssm_mp.checkpoints import load_checkpoint
    from ssm_mp.model import build

    checkpoint = load_checkpoint(path)
    return build(checkpoint.config, checkpoint.tensors)
