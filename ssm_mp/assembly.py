"""Model families: `build` puts component modules together into a language model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from ssm_mp.blocks.mamba1 import MambaLayer
from ssm_mp.blocks.shared_step import IteraLayer
from ssm_mp.config import Config, MambaConfig
from ssm_mp.kernels.scan import (
    Scan,
    selective_scan,
    selective_scan_reference,
    shared_step_scan,
    shared_step_scan_reference,
)
from ssm_mp.model import LanguageModel, Parts
from ssm_mp.modules.layers import component_module
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, Stored

__all__ = ["LanguageModel", "assemble", "build", "differentiable_scan"]


def differentiable_scan(config: Config) -> Scan:
    """The scan of a family that gradients pass through."""
    return selective_scan_reference if isinstance(config, MambaConfig) else shared_step_scan_reference


def assemble(config: Config, modules: Mapping[str, nn.Module], scan: Scan | None = None) -> LanguageModel:
    """A model of component modules by component name, in eval mode.

    scan: one of the family's, by default its fast one, which cannot be differentiated.
    """
    parts = Parts(modules)
    at = [parts.within(f"layers.{i}") for i in range(config.n_layers)]
    layers: list[nn.Module]
    if isinstance(config, MambaConfig):
        layers = [MambaLayer(config, part, scan or selective_scan) for part in at]
    else:
        layers = [
            IteraLayer(sizes, config.top_k, part, scan or shared_step_scan)
            for sizes, part in zip(config.layers, at, strict=True)
        ]
    return LanguageModel(config, parts, layers).eval()


def build(config: Config, tensors: Mapping[str, Tensor], scan: Scan | None = None) -> LanguageModel:
    """The model of canonical float tensors, held as they are (no copy); `scan` as in `assemble`."""
    stored: dict[str, dict[str, Stored]] = defaultdict(dict)
    kinds: dict[str, str] = {}
    for parameter in config.parameters():
        held = ByteTensor if parameter.role == "index" else FloatTensor
        stored[parameter.component][parameter.leaf] = held(tensors[parameter.name])
        kinds[parameter.component] = parameter.kind
    modules = {name: component_module(kinds[name], held, config) for name, held in stored.items()}
    return assemble(config, modules, scan)
