"""Model + precision map + activation statistics → a new mixed-precision model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssm_mp.components import Component, find_components
from ssm_mp.conversion.calibrate import Statistics, Steps
from ssm_mp.conversion.forms import Forms
from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.inputs import InputQuantizer, StaticInput, input_quantizer
from ssm_mp.modules.parameter import Parameter, held_by
from ssm_mp.precision_map import PrecisionMap, require_pins
from ssm_mp.precisions.precision import Unsure
from ssm_mp.precisions.quantize import powers_of_two
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.slices import largest_magnitude
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, ScaledColumns, SourceTensor, Stored
from ssm_mp.scheme import Scheme


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
        largest: Mapping[str, float] | None = None,
        rounded: Mapping[tuple[str, str], Stored] | None = None,
    ) -> None:
        """`components`: the model's own, with the sizes of another runtime's file, where they are not those of ours.

        forms: where components at precisions are kept; by default all in memory. steps: told what a map takes to make.
        largest: the magnitudes of the model's tensors by name, as far as they are known. rounded: weights whose
        rounding was compensated, by component and precision; all others are rounded to the nearest.
        """
        if scheme.activations == "static" and statistics is None:
            raise PrecisionMapError(
                "static activation scales need calibration statistics: pass calibrate(model, windows)"
            )
        self.model = model
        self.scheme = scheme
        self._statistics = statistics or {}
        scaled = {name for name, one in self._statistics.items() if one.exponent is not None}
        every = find_components(model) if components is None else components
        self.components = tuple(replace(c, scaled=True) if c.name in scaled else c for c in every)
        self._forms = Forms() if forms is None else forms
        self._steps = steps
        self._largest = dict(largest or {})
        self._rounded = rounded or {}

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
        """Why a component cannot be held at a precision; None where it can. Nothing is quantised to find out, unless
        the largest magnitudes do not tell."""
        held = get_precision(precision)
        for parameter in component.parameters:
            refused = held.refusal(self._largest_of(parameter), parameter.role, self.scheme.weight_scales)
            if isinstance(refused, Unsure):
                return self._refused(lambda: self.module(component, precision))
            if refused is not None:
                return f"{parameter.name} cannot be {precision}: {refused}"
        return self._refused(lambda: self._inputs(component, precision))

    def _refused(self, make: Callable[[], object]) -> str | None:
        try:
            make()
        except InfeasibleError as error:
            return str(error)
        return None

    def _largest_of(self, parameter: Parameter) -> float:
        """The largest magnitude of a tensor, found once where it was not given."""
        if parameter.role == "index":
            return 0.0
        if parameter.name not in self._largest:
            source = self.model.component(parameter.component)
            self._largest[parameter.name] = largest_magnitude(held_by(source, parameter.leaf).arrays()[""])
        return self._largest[parameter.name]

    def _make(self, component: Component, name: str) -> nn.Module:
        source = self.model.component(component.name)
        tensors: dict[str, Stored] = {}
        for parameter in component.parameters:
            held = held_by(source, parameter.leaf)
            if isinstance(held, ByteTensor):
                tensors[parameter.leaf] = ByteTensor(held.value)
                continue
            if parameter.leaf == "weight" and (component.name, name) in self._rounded:
                tensors[parameter.leaf] = self._rounded[component.name, name].to(self.model.device)
                continue
            if not isinstance(held, FloatTensor) or not _is_source(held):
                raise PrecisionMapError(f"{parameter.name} is not float32: only the FP32 model can be converted")
            try:
                tensors[parameter.leaf] = self._stored(component, parameter, name, held.value.data)
            except InfeasibleError as error:
                raise InfeasibleError(f"{parameter.name} cannot be {name}: {error}") from None
        if self.model.after_layer is not None:
            self.model.after_layer(source)
        return component.form.module(tensors, self._inputs(component, name))

    def _stored(self, component: Component, parameter: Parameter, name: str, tensor: Tensor) -> Stored:
        """One tensor at a precision."""
        precision, rule = get_precision(name), self.scheme.weight_scales
        if parameter.role == "weight" and component.scales_columns(name, self.scheme.activations):
            exponent = self._exponent(component)
            return ScaledColumns(precision.store(tensor.float() * powers_of_two(exponent), "weight", rule), exponent)
        return precision.store(tensor, parameter.role, rule)

    def _exponent(self, component: Component) -> Tensor:
        exponent = self._statistics[component.name].exponent
        assert exponent is not None
        return exponent.to(self.model.device)

    def _inputs(self, component: Component, name: str) -> InputQuantizer | None:
        """The input quantiser that the scheme asks for."""
        scheme = component.input_scheme(name, self.scheme.activations)
        if scheme == "static":
            try:
                scale = self._statistics[component.name].scale(self.scheme.input_scales)
            except InfeasibleError as error:
                raise InfeasibleError(f"inputs of {component.name} cannot be {name}: {error}") from None
            scaled = component.scales_columns(name, scheme)
            return StaticInput(scale.to(self.model.device), self._exponent(component) if scaled else None)
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
