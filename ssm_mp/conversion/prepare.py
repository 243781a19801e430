"""A function-preserving preparation before rounding: scales moved from what makes a product's inputs into its weight.

Scales are powers of two, so that in floating point the prepared model computes the very products of the given one, in
float16 too. Where nothing makes the inputs that scales could be folded into, a component gets exponents of its own, by
which its static int8 inputs are divided as they are rounded.

Dimensions: `k` inputs and `n` outputs of a product, `m` tokens, `s` scales of a folding.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssm_mp.blocks.folding import Folding, Rows
from ssm_mp.components import Component, find_components
from ssm_mp.config import Config
from ssm_mp.conversion.calibrate import Watcher, observed
from ssm_mp.data import Windows
from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter, held_by
from ssm_mp.precisions.quantize import histogram_scale, powers_of_two, quantize_tensor
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import Scheme

LIMIT = 8
"""Largest magnitude of an exponent: scales stay between 1 / 256 and 256, far from float16's ends."""
_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""How much of the differences between channels scales take away, as exponents of their magnitudes."""
_HELD_OUT = 4
"""One of so many calibration windows is held out: on it scales are chosen that the others give."""
_TOKENS = 2048
"""Tokens of the held-out windows at most that a choice is made on."""
_FEWEST = 64
"""Tokens below which a component's inputs are hardly known: it is left as it is."""
FEWEST_ALONE = 1 << 16
"""The same where nothing can be folded: a channel whose rare large values were not seen is cut off at its scale."""
_STRENGTHS_ALONE, _LIMIT_ALONE = (0.5,), 2
"""The same there, where it matters that a channel's range stays well above what is seen in it."""
_BINS = 2048
_LEAST_GAIN = 0.95
"""What errors must fall to, at least, before anything is changed."""
_WORST = 1.02
"""What the error of no single precision may rise to."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What was chosen: exponents of two of each folding's scales, in the order of `foldings_of`, int8 `[s]` each, all
    zero where it is left as it is; and by component those of inputs that nothing can be folded into, int8 `[k]`."""

    foldings: tuple[Tensor, ...]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Foldings that are not left as they are."""
        return sum(bool(exponent.any()) for exponent in self.foldings)

    @property
    def digest(self) -> str:
        """All scales as one short word."""
        found = hashlib.sha256()
        for exponent in self.foldings:
            found.update(exponent.numpy().tobytes())
        for name, exponent in sorted(self.inputs.items()):
            found.update(name.encode() + exponent.numpy().tobytes())
        return found.hexdigest()[:16]


def foldings_of(config: Config) -> tuple[Folding, ...]:
    """Every place of a model where scales can be moved, in the order of the data flow."""
    return tuple(_foldings(config))


def _foldings(config: Config) -> Iterator[Folding]:
    for i, branches in enumerate(config.branches):
        for branch in branches:
            at = [f"layers.{i}.{part.name}" for part in branch.parts]
            readers = tuple(
                f"{part.block.component(where, leaf)}.weight"
                for part, where in zip(branch.parts, at, strict=True)
                for leaf in part.block.entrances
            )
            yield _of_norm(f"layers.{i}.{branch.norm_name}", branch.norm, readers, config.d_model)
            for part, where in zip(branch.parts, at, strict=True):
                yield from part.block.foldings(where)
    if not config.tied:
        yield _of_norm("norm", config.final_norm, ("lm_head.weight",), config.d_model)


def _of_norm(name: str, form: NormForm, readers: tuple[str, ...], size: int) -> Folding:
    rows = (Rows(f"{name}.weight"), *((Rows(f"{name}.bias"),) if form.kind == "layer" else ()))
    return Folding(rows, readers, size, at_most_one=form.one_plus)


def unfoldable_of(config: Config) -> tuple[str, ...]:
    """The components whose static inputs may be scaled as they are rounded."""
    return tuple(
        part.block.component(f"layers.{i}.{part.name}", leaf)
        for i, branches in enumerate(config.branches)
        for branch in branches
        for part in branch.parts
        for leaf in part.block.unfoldable
    )


def folded(model: LanguageModel, scales: Sequence[Tensor | None]) -> LanguageModel:
    """The same FP32 function with other tensors; the given model is left as it is, whatever is not changed is shared.

    scales: of each of `foldings_of`, positive, `[s]`; None leaves it as it is.
    """
    require_in_memory(model)
    rows: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for folding, factors in zip(foldings_of(model.config), scales, strict=True):
        if factors is None:
            continue
        for producer in folding.producers:
            rows[producer.tensor].append((producer.start, factors))
        for consumer in folding.consumers:
            columns[consumer].append(folding.columns(factors))
    modules = {}
    for component in find_components(model):
        module = model.component(component.name)
        if any(p.name in rows or p.name in columns for p in component.parameters):
            held: dict[str, Stored] = {}
            for parameter in component.parameters:
                own, name = held_by(module, parameter.leaf), parameter.name
                touched = name in rows or name in columns
                held[parameter.leaf] = _scaled(parameter, own, rows[name], columns[name]) if touched else own
            module = component.form.module(held, None)
        modules[component.name] = module
    return assemble(model.config, modules, after_layer=model.after_layer)


def _scaled(
    parameter: Parameter, held: Stored, rows: Iterable[tuple[int, Tensor]], columns: Iterable[Tensor]
) -> FloatTensor:
    """A tensor with some of its rows divided and all of its columns multiplied."""
    value = held.tensor().clone()
    less = 1 if isinstance(parameter.form, NormForm) and parameter.form.one_plus else 0
    value += less
    for start, factors in rows:
        value[start : start + len(factors)] /= factors.to(value.device).view(-1, *[1] * (value.dim() - 1))
    for factors in columns:
        value *= factors.to(value.device)
    return FloatTensor(value - less if less else value)


def prepared_model(model: LanguageModel, prepared: Prepared) -> LanguageModel:
    """The model with everything folded that was chosen."""
    return folded(model, [powers_of_two(e) if e.any() else None for e in prepared.foldings])


def require_in_memory(model: LanguageModel) -> None:
    """Raise PrecisionMapError where a model is run layer by layer: changed tensors would have to be held beside it."""
    if model.after_layer is not None:
        raise PrecisionMapError(
            "prepare = 'scales' holds the prepared weights in memory, but this model is too large for that and is read "
            "layer by layer; take prepare = 'none', or allow more memory with [search] memory_gib"
        )


class _Seen:
    """Inputs of one component: the largest of each channel and its mean second and fourth powers on most windows, and
    tokens of these and of the windows that are held out, spread over all of them."""

    def __init__(self, windows: int) -> None:
        self.largest: Tensor | None = None
        self.powers: Tensor | None = None  # sums of squares and of fourth powers, float64 [2, k]
        self.count = 0
        self.kept: dict[bool, list[Tensor]] = {True: [], False: []}
        self._a_window = max(1, _TOKENS * _HELD_OUT // max(1, windows))

    def see(self, x: Tensor, held_out: bool) -> None:
        """Inputs of one window; an expert may see several parts of it, or none."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        kept = self.kept[held_out]
        left = (_TOKENS if held_out else _TOKENS * (_HELD_OUT - 1)) - sum(map(len, kept))
        if left > 0:
            stride = max(1, len(x) // self._a_window)
            kept.append(x[len(kept) % stride :: stride][:left].clone())
        if held_out:
            return
        squares = x.double().square()
        largest, powers = x.abs().amax(dim=0), torch.stack([squares.sum(dim=0), squares.square().sum(dim=0)])
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.powers = powers if self.powers is None else self.powers + powers
        self.count += len(x)

    @property
    def is_known(self) -> bool:
        """Whether enough was seen, and all of it is finite: what is not, calibration and the baseline say."""
        enough = self.count >= _FEWEST and sum(map(len, self.kept[True])) >= _FEWEST
        every = [part for kept in self.kept.values() for part in kept]
        return enough and all(bool(part.isfinite().all()) for part in (self.magnitudes()[2], *every))

    def magnitudes(self) -> tuple[Tensor, Tensor, Tensor]:
        """By channel: the largest, and the roots of the mean square and of the mean fourth power, float32 `[k]`."""
        assert self.largest is not None
        assert self.powers is not None
        squares, fourths = self.powers / self.count
        return self.largest, squares.sqrt().float(), fourths.sqrt().sqrt().float()


def prepare(
    model: LanguageModel,
    windows: Windows,
    precisions: Sequence[str],
    scheme: Scheme,
    step: Callable[[], None] = lambda: None,
) -> Prepared:
    """Scales that make the errors of a model's products smaller at these precisions, chosen on calibration windows.

    step: is called after each product that was looked at. The model is left as it is. Raises PrecisionMapError where it
    is too large.
    """
    require_in_memory(model)
    components = {component.name: component for component in find_components(model)}
    foldings = foldings_of(model.config)
    enough = windows.ids.numel() >= FEWEST_ALONE
    alone = unfoldable_of(model.config) if scheme.activations == "static" and enough else ()
    first = [folding.consumers[0].removesuffix(".weight") for folding in foldings]
    seen = _inputs(model, windows, {*first, *alone})
    errors = _Errors(model, components, [name for name in precisions if get_precision(name).bits < 16], scheme)
    exponents, own = [], {}
    for folding, name in zip(foldings, first, strict=True):
        exponents.append(errors.best(folding, seen[name]))
        step()
    for name in alone:
        size = held_by(model.component(name), "weight").shape[1]
        chosen = errors.best(Folding((), (f"{name}.weight",), size), seen[name], only_integers=True)
        if chosen.any():
            own[name] = chosen
        step()
    return Prepared(tuple(exponents), own)


def _inputs(model: LanguageModel, windows: Windows, names: set[str]) -> dict[str, _Seen]:
    """What reaches some components, in one pass over the windows."""
    seen, held_out = {name: _Seen(len(windows)) for name in names}, [False]

    def watcher(name: str) -> Watcher:
        def see(x: Tensor, *expert: int) -> Tensor:
            seen[name].see(x, held_out[0])
            return x

        return see

    watched = observed(model, {name: watcher(name) for name in names if name != "lm_head"})
    with torch.inference_mode():
        for i, ids in enumerate(windows.ids.to(model.device)):
            held_out[0] = i % _HELD_OUT == _HELD_OUT - 1
            hidden = watched.hidden(ids[None])
            if "lm_head" in names:
                seen["lm_head"].see(model.final(hidden), held_out[0])
    return seen


class _Errors:
    """Errors of products at precisions, with scales and without."""

    def __init__(
        self, model: LanguageModel, components: Mapping[str, Component], precisions: Sequence[str], scheme: Scheme
    ) -> None:
        self._model, self._components = model, components
        self._precisions, self._scheme = precisions, scheme

    def best(self, folding: Folding, seen: _Seen, *, only_integers: bool = False) -> Tensor:
        """Exponents of the scales with the smallest errors, int8 `[s]`; zeros where none are clearly smaller.

        only_integers: of precisions whose inputs are integers alone.
        """
        none = torch.zeros(folding.size, dtype=torch.int8)
        if not seen.is_known:
            return none
        x, others = torch.cat(seen.kept[True]), torch.cat(seen.kept[False])
        tried = [p for p in self._precisions if get_precision(p).quantizes_inputs or not only_integers]
        consumers = [name for name in folding.consumers if self._is_free(name)]
        before = self._errors(x, others, consumers, tried, x.new_ones(x.shape[1]))
        if not len(before):
            return none
        best, least = none, _LEAST_GAIN
        largest, second, fourth = seen.magnitudes()
        strengths, limit = (_STRENGTHS_ALONE, _LIMIT_ALONE) if only_integers else (_STRENGTHS, LIMIT)
        for magnitudes in (largest, fourth if only_integers else second):
            for strength in strengths:
                exponent = _exponent(folding.largest(magnitudes), strength, limit, at_most_one=folding.at_most_one)
                after = self._errors(x, others, consumers, tried, folding.columns(powers_of_two(exponent)))
                ratios = after / before.clamp(min=1e-30)
                mean = float(ratios.log().mean().exp())
                if mean < least and float(ratios.max()) <= _WORST:
                    best, least = exponent.cpu(), mean
        return best

    def _step(self, inputs: Tensor) -> Tensor:
        """The static scale that a study's rule takes from inputs `[m, k]`: float32 `[1]`."""
        magnitudes = inputs.abs()
        largest = float(magnitudes.max())
        counts = torch.histc(magnitudes, _BINS, 0.0, largest or 1.0).double().cpu()
        return histogram_scale(counts, largest, self._scheme.input_scales).float().to(inputs.device)

    def _is_free(self, weight: str) -> bool:
        return self._components[weight.removesuffix(".weight")].pin is None

    def _errors(
        self, x: Tensor, others: Tensor, consumers: Sequence[str], precisions: Sequence[str], scales: Tensor
    ) -> Tensor:
        """Square error of the products of all consumers at each precision, float32 `[precisions]`; infinite where one
        cannot hold them.

        x, others: inputs `[m, k]` before scaling, those that errors are of, and those that their static scale comes
        from; scales: of the columns `[k]`.
        """
        found = torch.zeros(len(precisions))
        weights = [
            held_by(self._model.component(name.removesuffix(".weight")), "weight").tensor() for name in consumers
        ]
        try:
            for i, precision in enumerate(precisions):
                inputs = x
                if get_precision(precision).quantizes_inputs and self._scheme.activations == "static":
                    step = self._step(others / scales)
                    inputs = quantize_tensor(x / scales, step).float() * step * scales
                for weight in weights:
                    stored = get_precision(precision).store(weight * scales, "weight", self._scheme.weight_scales)
                    found[i] += float((inputs @ (stored.tensor() / scales).T - x @ weight.T).square().sum())
        except InfeasibleError:
            return torch.full((len(precisions),), float("inf"))
        return found if consumers else found[:0]


def _exponent(magnitudes: Tensor, strength: float, limit: int, *, at_most_one: bool) -> Tensor:
    """Exponents of the scales that take away some of the differences between channels: int8 `[s]`, about 0 on average,
    or at most 0 where scales may not be above 1."""
    known = magnitudes[magnitudes > 0]
    if not len(known):
        return torch.zeros_like(magnitudes, dtype=torch.int8)
    logs = magnitudes.clamp(min=float(known.min())).log2() * strength
    middle = logs.max() if at_most_one else logs.mean()
    return (logs - middle).round_().clamp_(-limit, limit).to(torch.int8)
