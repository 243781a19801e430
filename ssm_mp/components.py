"""The components of a model: the smallest parts that get one precision each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch

from ssm_mp.config import Config
from ssm_mp.modules.parameter import Form, Parameter
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import ArraySpec
from ssm_mp.scheme import ActivationScheme

ALWAYS_PINNED = frozenset({"A_log", "D"})
"""Kinds that stay fp16 in every study."""
DEFAULT_PINNED = frozenset({"norm", "router", "token_gate", "correction_bias", "dt_bias", "B", "C"})
"""Kinds that stay fp16 unless a study lifts the pin."""

Pin = Literal["always", "default"]


class HasConfig(Protocol):
    """A model or a checkpoint."""

    @property
    def config(self) -> Config: ...


@dataclass(frozen=True)
class Component:
    """One part of a model that gets one precision: a projection with its bias, a norm, `A_log`, …

    `stage` is where in the forward pass it first acts: 0 the embedding, i + 1 layer i, then the head.
    A tied head belongs to the embedding. `scaled`: whether, where its inputs are static, each is divided by a power of
    two of its own first, at a byte each. `sizes`: bytes by precision in the file of another runtime, where a search is
    for one; empty where it is for our own.
    """

    name: str
    kind: str
    layer: int | None
    stage: int
    parameters: tuple[Parameter, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    scaled: bool = False

    @property
    def form(self) -> Form:
        """What kind of module it is."""
        return self.parameters[0].form

    @property
    def multiplies_inputs(self) -> bool:
        """Whether its inputs may be quantised."""
        return self.form.multiplies_inputs

    @property
    def pin(self) -> Pin | None:
        """Whether its precision is pinned to fp16: always, by default, or not."""
        if self.kind in ALWAYS_PINNED:
            return "always"
        return "default" if self.kind in DEFAULT_PINNED else None

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(prod(parameter.shape) for parameter in self.parameters if parameter.role != "index")

    @property
    def fp32_bytes(self) -> int:
        return 4 * self.count

    def input_scheme(self, precision: str, scheme: ActivationScheme) -> ActivationScheme:
        """How its inputs are quantised at a precision: by the study's scheme where both have a part in it."""
        if scheme == "blocks":  # whatever the precision of the weight, unless it is one that multiplies in float32
            return scheme if self.multiplies_inputs and not getattr(self.form, "in_float32", False) else "none"
        takes_part = self.multiplies_inputs and get_precision(precision).quantizes_inputs
        return scheme if takes_part else "none"

    def scales_columns(self, precision: str, scheme: ActivationScheme) -> bool:
        """Whether the columns of its weight are stored scaled at a precision, as its inputs are."""
        return self.scaled and self.input_scheme(precision, scheme) == "static"

    def arrays(self, parameter: Parameter, precision: str, scheme: ActivationScheme) -> dict[str, ArraySpec]:
        """What is stored of one of its tensors at a precision: suffix → array."""
        arrays = get_precision(precision).arrays(parameter.shape, parameter.role)
        if parameter.role == "weight" and self.scales_columns(precision, scheme):
            return {**arrays, "exponent": ArraySpec(parameter.shape[1:], torch.int8)}
        return arrays

    def bytes(self, precision: str, scheme: ActivationScheme) -> int:
        """Stored bytes at a precision, weight scales and the static input scale (2 bytes) included."""
        if self.sizes:
            return dict(self.sizes)[precision]
        every = (self.arrays(parameter, precision, scheme).values() for parameter in self.parameters)
        tensors = sum(array.bytes for arrays in every for array in arrays)
        return tensors + (2 if self.input_scheme(precision, scheme) == "static" else 0)


def find_components(source: HasConfig) -> tuple[Component, ...]:
    """The components of a model or checkpoint, in the order of the data flow.

    >>> from ssm_mp import find_components, load_checkpoint
    >>> checkpoint = load_checkpoint("studies/reference/model.safetensors")
    >>> find_components(checkpoint)[0].name
    'embedding'
    """
    config = source.config
    grouped: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in config.parameters():
        grouped[parameter.component].append(parameter)
    return tuple(_component(name, tuple(parameters), config) for name, parameters in grouped.items())


def _component(name: str, parameters: tuple[Parameter, ...], config: Config) -> Component:
    kind, layer = parameters[0].kind, parameters[0].layer
    if layer is not None:
        stage = layer + 1
    else:
        stage = 0 if kind in ("embedding", "position_embedding") else config.n_layers + 1
    return Component(name, kind, layer, stage, parameters)


def fp32_bytes(components: Iterable[Component]) -> int:
    """Bytes of the FP32 tensors, tied ones once."""
    return sum(component.fp32_bytes for component in components)
