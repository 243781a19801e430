"""Model + precision map + activation statistics → a new mixed-precision model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ssm_mp.components import Component, find_components
from ssm_mp.conversion.calibrate import Statistics
from ssm_mp.conversion.forms import Forms
from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.inputs import InputQuantizer, StaticInput, input_quantizer
from ssm_mp.precision_map import PrecisionMap, require_pins
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, SourceTensor, Stored
from ssm_mp.scheme import Scheme

Steps = Callable[[str, int], Callable[[], None]]
"""Begins a stage of so many steps; what it returns is called after each of them."""


class Converter:
    """Converts one FP32 model by any number of maps; each component is quantised once per precision.

    The converted models share those modules by reference and never share any with the FP32 model. They are run layer by
    layer where that is.
    """

    def __init__(
        self,
        model: LanguageModel,
        scheme: Scheme,
        statistics: Statistics | None = None,
        components: tuple[Component, ...] | None = None,
        forms: Forms | None = None,
        steps: Steps | None = None,
    ) -> None:
        """`components`: the model's own, with the sizes of another runtime's file, where they are not those of ours.

        forms: where components at precisions are kept; by default all in memory. steps: told what a map takes to make.
        """
        if scheme.activations == "static" and statistics is None:
            raise PrecisionMapError(
                "static activation scales need calibration statistics: pass calibrate(model, windows)"
            )
        self.model = model
        self.scheme = scheme
        self.components = find_components(model) if components is None else components
        self._statistics = statistics or {}
        self._forms = Forms() if forms is None else forms
        self._steps = steps

    def convert(self, precision_map: PrecisionMap) -> LanguageModel:
        """A new model by `precision_map`. Raises InfeasibleError naming the component that does not fit."""
        precisions = precision_map.to_json()
        names = {component.name for component in self.components}
        if names != precisions.keys():
            odd = sorted(names ^ precisions.keys())
            raise PrecisionMapError(f"this map is of another model: {', '.join(odd[:5])} in only one of them")
        require_pins(precision_map, self.components)
        missing = sum((name, precision) not in self._forms for name, precision in precisions.items())
        step = self._steps("quantising", missing) if self._steps is not None and missing else None
        modules: dict[str, nn.Module] = {}
        for component in self.components:
            known = (component.name, precisions[component.name]) in self._forms
            modules[component.name] = self.module(component, precisions[component.name])
            if step is not None and not known:
                step()
        return assemble(self.model.config, modules, after_layer=self.model.after_layer)

    def module(self, component: Component, precision: str) -> nn.Module:
        """The module of one component at one precision, made once."""
        return self._forms.get((component.name, precision), lambda: self._make(component, precision))

    def infeasible(self, component: Component, precision: str) -> str | None:
        """Why a component cannot be held at a precision; None where it can."""
        try:
            self.module(component, precision)
        except InfeasibleError as error:
            return str(error)
        return None

    def _make(self, component: Component, name: str) -> nn.Module:
        precision = get_precision(name)
        source = self.model.component(component.name)
        tensors: dict[str, Stored] = {}
        for parameter in component.parameters:
            held = source if isinstance(source, Stored) else getattr(source, parameter.leaf)
            if isinstance(held, ByteTensor):
                tensors[parameter.leaf] = ByteTensor(held.value)
                continue
            if not isinstance(held, FloatTensor) or not _is_source(held):
                raise PrecisionMapError(f"{parameter.name} is not float32: only the FP32 model can be converted")
            try:
                value = held.value.data.float()
                tensors[parameter.leaf] = precision.store(value, parameter.role, self.scheme.weight_scales)
            except InfeasibleError as error:
                raise InfeasibleError(f"{parameter.name} cannot be {name}: {error}") from None
        if self.model.after_layer is not None:
            self.model.after_layer(source)
        return component.form.module(tensors, self._inputs(component, name))

    def _inputs(self, component: Component, name: str) -> InputQuantizer | None:
        """The input quantiser that the scheme asks for."""
        scheme = component.input_scheme(name, self.scheme.activations)
        if scheme == "static":
            try:
                return StaticInput(self._statistics[component.name].scale(self.scheme.input_scales))
            except InfeasibleError as error:
                raise InfeasibleError(f"inputs of {component.name} cannot be {name}: {error}") from None
        return input_quantizer(scheme, name)


def _is_source(held: FloatTensor) -> bool:
    """Whether a tensor is one of an FP32 model, which may hold it in a smaller type."""
    return isinstance(held, SourceTensor) or held.value.dtype == torch.float32


def convert(
    model: LanguageModel,
    precision_map: PrecisionMap,
    scheme: Scheme | None = None,
    statistics: Statistics | None = None,
) -> LanguageModel:
    """A new model converted by a map; the given one is left as it is.

    statistics: of `calibrate(model, windows)`, needed by the default scheme (static activations).
    Raises InfeasibleError where a component does not fit its precision.

    >>> from ssm_mp import PrecisionMap, Scheme, convert, find_components, load_model
    >>> model = load_model("studies/reference/model.safetensors")
    >>> everywhere = PrecisionMap.uniform("int8", find_components(model))
    >>> convert(model, everywhere, Scheme(activations="none")) is model
    False
    """
    return Converter(model, scheme or Scheme(), statistics).convert(precision_map)
