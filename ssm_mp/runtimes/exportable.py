"""What is written for another runtime: a converted model, with what its user needs beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ssm_mp.components import Component, find_components
from ssm_mp.config import Config
from ssm_mp.errors import ExportError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.inputs import input_quantizer
from ssm_mp.modules.parameter import Parameter, held_by
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, ScaledColumns, Stored
from ssm_mp.scheme import ActivationScheme, ScaleRule


@dataclass(frozen=True, eq=False)
class Exportable:
    """A converted model and what goes with it.

    precision_map: None where every tensor is float32 (`twin`). source: the checkpoint's own `config.json`, as far as it
    had one. tokenizer: a `tokenizer.json`. files: further files that belong to it, such as `tokenizer_config.json`.
    """

    name: str
    model: LanguageModel
    precision_map: PrecisionMap | None
    source: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ExportError where columns of a weight are scaled: no other runtime scales inputs against them."""
        scaled = [name for name, (_, held) in self.stored().items() if isinstance(held, ScaledColumns)]
        if scaled:
            raise ExportError(
                f"{scaled[0]} is stored with a scale for each of its static inputs, which no other runtime knows; "
                'search with [precision] prepare = "none", or with activations other than "static"'
            )

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def components(self) -> tuple[Component, ...]:
        return find_components(self.model)

    def precision(self, component: str) -> str:
        """The precision of a component; `fp32` in a twin."""
        return "fp32" if self.precision_map is None else self.precision_map[component]

    def stored(self) -> dict[str, tuple[Parameter, Stored]]:
        """Every tensor as it is stored, by its canonical name, in the order of the data flow."""
        found: dict[str, tuple[Parameter, Stored]] = {}
        for component in self.components:
            module = self.model.component(component.name)
            for parameter in component.parameters:
                found[parameter.name] = (parameter, held_by(module, parameter.leaf))
        return found

    def tensor(self, name: str) -> Tensor:
        """One dequantised tensor, float32, by its canonical name."""
        return self.stored()[name][1].tensor()


def twin(item: Exportable) -> Exportable:
    """The same model with every dequantised tensor as float32: what tells an error of names from one of arithmetic."""

    def unpacked(component: Component, parameter: Parameter, held: Stored) -> Stored:
        return held if isinstance(held, ByteTensor) else FloatTensor(held.tensor().clone())

    return replace(item, model=_rebuilt(item, unpacked), precision_map=None)


def with_inputs(item: Exportable, scheme: ActivationScheme) -> Exportable:
    """The same stored tensors, multiplied with inputs that are rounded as a runtime rounds them; nothing calibrated
    travels into another runtime's file."""
    assert scheme != "static"
    return replace(item, model=_rebuilt(item, lambda component, parameter, held: held, scheme))


def at_precisions(item: Exportable, changes: Mapping[str, str]) -> Exportable:
    """The same model, inputs not rounded, with some components stored anew, from their dequantised values, at other
    precisions.

    Raises InfeasibleError where one does not fit.
    """
    assert item.precision_map is not None

    def anew(component: Component, parameter: Parameter, held: Stored) -> Stored:
        if component.name not in changes or isinstance(held, ByteTensor):
            return held
        return get_precision(changes[component.name]).store(held.tensor(), parameter.role, ScaleRule())

    return replace(item, model=_rebuilt(item, anew), precision_map=item.precision_map.changed(changes))


def _rebuilt(
    item: Exportable, store: Callable[[Component, Parameter, Stored], Stored], scheme: ActivationScheme = "none"
) -> LanguageModel:
    """A model of the same components, each tensor as `store` has it, inputs rounded by a scheme without calibration."""
    modules: dict[str, nn.Module] = {}
    for component in item.components:
        module, precision = item.model.component(component.name), item.precision(component.name)
        held = {p.leaf: store(component, p, held_by(module, p.leaf)) for p in component.parameters}
        how = component.input_scheme(precision, scheme) if precision != "fp32" else "none"
        modules[component.name] = component.form.module(held, input_quantizer(how, precision))
    return assemble(item.config, modules)
