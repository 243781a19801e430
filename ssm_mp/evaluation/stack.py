"""Many candidates at once: one forward pass of several converted models, stacked along the batch.

Dimensions: `b` windows, `L` window length, `d` model, `r` rows.

A *row* is `b` windows under one choice of precisions up to some layer. Candidates that agree so far share a row, and
part where they differ; tensors of a stack are `[r·b, …]`, row after row. Within a layer each component runs once for
every precision that occurs in it, on the rows that have it; the scan, whose parameters no map changes, runs once.

The readable reference is `evaluate`, one converted model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import State
from ssm_mp.components import Component, find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError, InfeasibleError
from ssm_mp.evaluation.compare import Expected, compare_windows, diverged
from ssm_mp.evaluation.evaluate import Evaluation, require_finite, scorer_of, window_nll
from ssm_mp.model import LanguageModel, Layer, Residual, Scorer, assemble
from ssm_mp.modules.convolution import ConvolutionForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.parallel import in_parallel
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.shards import token_bytes

Outcome = Evaluation | EvaluationError | InfeasibleError
"""What a map measures, or why it cannot be."""

Rows = np.ndarray[tuple[int, int], np.dtype[np.float64]]
"""Negative log-likelihoods `[maps, windows]`."""

Key = TypeVar("Key")

_GPU_WINDOWS = 32
_GPU_SHARE = 0.7
_SHARD_TOKENS = 1024
"""Tokens of all rows that one thread of a CPU takes at a time, as in `evaluate`."""
_CPU_BYTES = 1 << 28


class Split(nn.Module):
    """One component (or branch) of several rows: each distinct module runs once, on all the rows that have it."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        """`modules`: that of each row, one after another."""
        super().__init__()
        numbers, distinct = numbered(modules)
        self.rows = len(modules)
        self.choices = nn.ModuleList(distinct)
        self.members = [_run_or_index([r for r, n in enumerate(numbers) if n == m], device) for m in set(numbers)]

    def forward(self, *values: Tensor | None) -> Any:
        """Tensors `[r·b, …]`, as many as the component takes → what it returns, one tensor or several."""
        merged: list[Tensor] = []
        single = True
        for module, members in zip(self.choices, self.members, strict=True):
            found = module(*(None if value is None else _taken(value, members, self.rows) for value in values))
            single = isinstance(found, Tensor)
            parts = [found] if single else list(found)
            if not merged:
                share = members.shape[0] if isinstance(members, Tensor) else members.stop - members.start
                merged = [part.new_empty(part.shape[0] // share * self.rows, *part.shape[1:]) for part in parts]
            for whole, part in zip(merged, parts, strict=True):
                by_row = whole.unflatten(0, (self.rows, -1))  # [r, b, …]
                by_row[members] = part.unflatten(0, (-1, by_row.shape[1]))
        return merged[0] if single else tuple(merged)


def _run_or_index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Row numbers as a slice where they are one run, which then needs no copy."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _taken(value: Tensor, members: slice | Tensor, rows: int) -> Tensor:
    """Some rows of `[r·b, …]`, flat again."""
    taken: Tensor = value.unflatten(0, (rows, -1))[members].flatten(0, 1)
    return taken


def numbered(items: Iterable[Key]) -> tuple[list[int], list[Key]]:
    """Each item's number among the distinct ones, and those, in the order in which they come first."""
    distinct: dict[Key, int] = {}
    numbers = [distinct.setdefault(item, len(distinct)) for item in items]
    return numbers, list(distinct)


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer of a stack: which row before it each of its rows comes from, and what it computes."""

    parents: Tensor
    layer: nn.Module
    rows_before: int

    def __call__(self, x: Tensor) -> Tensor:
        """`[r before·b, L, d]` → `[r·b, L, d]`."""
        if self.parents.shape[0] != self.rows_before:  # they rise, so as many as before are the same ones
            x = _taken(x, self.parents, self.rows_before)
        out: Tensor = self.layer(x)
        return out


@dataclass(frozen=True, eq=False)
class Head:
    """Norm and head of the maps that agree in both: one of their models, its `scorer`, their numbers and rows."""

    model: LanguageModel
    score: Scorer
    maps: list[int]
    rows: slice | Tensor

    def compared(self, hidden: Tensor, ids: Tensor, score_reference: Scorer, expected: Tensor) -> tuple[Rows, Rows]:
        """The same, and divergences `[maps, b]` from a reference's last hidden states `[b, L, d]`."""
        count = len(self.maps)
        states, columns = hidden[self.rows].flatten(0, 1), self.model.columns(ids[:, 1:]).repeat(count, 1)
        found = compare_windows(self.score, states, columns, score_reference, expected.repeat(count, 1, 1))
        nll, kl = (of_windows.reshape(count, -1) for of_windows in found[:2])
        return nll, kl

    def nll(self, hidden: Tensor, ids: Tensor) -> Rows:
        """Last hidden states `[r, b, L, d]` of all rows → negative log-likelihoods `[maps, b]`."""
        states = hidden[self.rows].flatten(0, 1)  # [maps·b, L, d]
        found = window_nll(self.model, self.score, states, ids.repeat(len(self.maps), 1))
        by_map: Rows = found.reshape(len(self.maps), -1)
        return by_map


@dataclass(frozen=True, eq=False)
class Stack:
    """Converted models of different maps, run as one; `embeds` is one model for each row of embedded windows."""

    maps: int
    embeds: tuple[LanguageModel, ...]
    stages: tuple[Stage, ...]
    heads: tuple[Head, ...]

    def hidden(self, ids: Tensor, before_layer: Callable[[], None] | None = None) -> Tensor:
        """Token ids `[b, L]` → last hidden states `[r, b, L, d]`; `before_layer` is called before each layer."""
        x = torch.cat([model.embed(ids) for model in self.embeds])  # [r·b, L, d]
        for stage in self.stages:
            if before_layer is not None:
                before_layer()
            x = stage(x)
        rows: Tensor = x.unflatten(0, (-1, ids.shape[0]))
        return rows

    def nll(self, ids: Tensor, before_layer: Callable[[], None] | None = None) -> Rows:
        """Negative log-likelihood of each window for each map: float64 `[maps, b]`."""
        hidden = self.hidden(ids, before_layer)
        found = np.empty((self.maps, ids.shape[0]))
        for head in self.heads:
            found[head.maps] = head.nll(hidden, ids)
        return found

    def compared(
        self, ids: Tensor, score_reference: Scorer, expected: Tensor, before_layer: Callable[[], None] | None = None
    ) -> tuple[Rows, Rows]:
        """The same, and divergences `[maps, b]` from a reference's last hidden states `[b, L, d]`."""
        hidden = self.hidden(ids, before_layer)
        nll, kl = (np.empty((self.maps, ids.shape[0])) for _ in range(2))
        for head in self.heads:
            nll[head.maps], kl[head.maps] = head.compared(hidden, ids, score_reference, expected)
        return nll, kl


def make_stack(
    converter: Converter, maps: Sequence[PrecisionMap], models: Sequence[LanguageModel] | None = None
) -> Stack:  # fmt: skip
    """The stack of different maps, best in the order of `in_order`, so that rows that share a module are neighbours.

    models: the maps' own, where they are converted already. Raises InfeasibleError where one cannot be converted.
    """
    if models is None:
        models = [converter.convert(precision_map) for precision_map in maps]
    held = [precision_map.to_json() for precision_map in maps]
    device = models[0].device
    acting = [[c for c in converter.components if c.stage == i] for i in range(models[0].config.n_layers + 1)]
    row_of, rows = numbered(_precisions(one, acting[0]) for one in held)  # of each map, so far
    embeds = tuple(models[row_of.index(r)] for r in range(len(rows)))
    counts, parents, owners = [len(rows)], [], []
    for here in acting[1:]:
        row_of, found = numbered((r, _precisions(one, here)) for r, one in zip(row_of, held, strict=True))
        counts.append(len(found))
        parents.append(torch.tensor([r for r, _ in found], device=device))
        owners.append([row_of.index(r) for r in range(len(found))])
    layers = _layers(models, held, acting[1:], owners, device)
    stages = tuple(Stage(*stage) for stage in zip(parents, layers, counts[:-1], strict=True))
    return Stack(len(maps), embeds, stages, _heads(models, held, converter.components, row_of, device))


def _layers(
    models: Sequence[LanguageModel],
    held: Sequence[Mapping[str, str]],
    acting: Sequence[Sequence[Component]],
    owners: Sequence[Sequence[int]],
    device: torch.device,
) -> list[nn.Module]:
    """The layers of a stack; `acting` are the components of each, `owners` a map for each of its rows.

    Projections, convolutions and the norms of branches take tokens apart and are split each for itself. A block whose
    rows differ in anything else is split as a whole: in values that take part in what all rows do (B and C of the
    `itera` family), in norms that a block may compute with its gate, or in experts, which gather tokens from all rows.
    """
    config = models[0].config
    modules = {c.name: models[0].component(c.name) for c in find_components(models[0])}
    whole: list[tuple[int, int, int, list[int]]] = []  # layer, branch and part, and a map for each row
    for i, (components, own) in enumerate(zip(acting, owners, strict=True)):
        apart = {component.name for component in components}
        for k, branch in enumerate(config.branches[i]):
            for j, part in enumerate(branch.parts):
                names = {parameter.component for parameter in part.block.parameters(f"layers.{i}.{part.name}", i)}
                inside = [c for c in components if c.name in names]
                together = [c for c in inside if part.block.gathers_tokens or not _is_called(c)]
                if not _agree(held, own, together):
                    whole.append((i, k, j, _first_alike(held, own, inside)))
                    apart -= names
        for component in components:
            if component.name in apart and not _agree(held, own, [component]):
                modules[component.name] = Split([models[m].component(component.name) for m in own], device)
    layers: list[nn.Module] = list(assemble(config, modules).layers)
    for i, k, j, alike in whole:
        outputs = {m: _Output(_mixings(models[m].layers[i], k)[j]) for m in alike}
        _mixings(layers[i], k)[j] = _Stateless(Split([outputs[m] for m in alike], device))
    return layers


def _mixings(layer: nn.Module, branch: int) -> nn.ModuleList:
    assert isinstance(layer, Layer)
    residual = layer.branches[branch]
    assert isinstance(residual, Residual)
    return residual.mixings


def _is_called(component: Component) -> bool:
    """Whether a block only ever calls it with tokens, so that another module can stand in its place."""
    return isinstance(component.form, LinearForm | ConvolutionForm)


class _Output(nn.Module):
    """A block without its state."""

    def __init__(self, mixing: nn.Module) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(self, u: Tensor) -> Tensor:
        """`u [b, l, d]` → `[b, l, d]`."""
        out: Tensor = self.mixing(u)[0]
        return out


class _Stateless(nn.Module):
    """Takes a block's place in a branch, from the beginning only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, u: Tensor, before: State | None = None) -> tuple[Tensor, State]:
        """`u [r·b, l, d]` → `[r·b, l, d]`, and no state."""
        assert before is None
        return self.inner(u), ()


def _precisions(held: Mapping[str, str], components: Iterable[Component]) -> tuple[str, ...]:
    return tuple(held[component.name] for component in components)


def _agree(held: Sequence[Mapping[str, str]], maps: Sequence[int], components: Sequence[Component]) -> bool:
    return len({_precisions(held[m], components) for m in maps}) == 1


def _first_alike(held: Sequence[Mapping[str, str]], maps: Sequence[int], components: Sequence[Component]) -> list[int]:
    """For each of some maps the first of them that agrees with it in these components."""
    numbers, _ = numbered(_precisions(held[m], components) for m in maps)
    return [maps[numbers.index(number)] for number in numbers]


def _heads(
    models: Sequence[LanguageModel],
    held: Sequence[Mapping[str, str]],
    components: Sequence[Component],
    row_of: Sequence[int],
    device: torch.device,
) -> tuple[Head, ...]:
    """The heads of a stack; `row_of` is each map's row after the last layer."""
    tied = models[0].config.tied
    needed = [c for c in components if c.name in ("norm", "lm_head") or (tied and c.kind == "embedding")]
    alike, distinct = numbered(_precisions(one, needed) for one in held)
    members = [[m for m, number in enumerate(alike) if number == n] for n in range(len(distinct))]
    with torch.inference_mode():
        return tuple(
            Head(models[maps[0]], models[maps[0]].scorer(), maps, _run_or_index([row_of[m] for m in maps], device))
            for maps in members
        )


def in_order(components: Sequence[Component], maps: Iterable[PrecisionMap]) -> list[PrecisionMap]:
    """Different maps, sorted along the data flow: neighbours then share the longest prefixes."""
    flow = sorted(components, key=lambda component: component.stage)
    keyed = {_precisions(one.to_json(), flow): one for one in maps}
    return [keyed[key] for key in sorted(keyed)]


def evaluate_stacked(
    converter: Converter,
    maps: Sequence[PrecisionMap],
    windows: Windows,
    before_layer: Callable[[], None] | None = None,
    most: int | None = None,
    expected: Expected | None = None,
) -> list[Outcome]:
    """`evaluate(converter.convert(map), windows)` of each map, to rounding, several maps in one pass; `diverge` where
    it is told from which reference.

    most: maps in one pass; by default as many as memory allows, and fewer where it turns out too small.
    before_layer: called before each layer; what it raises ends the evaluation.
    What is wrong with one map (InfeasibleError, EvaluationError) stands in its place in the list and leaves the
    others as they are.
    """
    most = most or at_once(converter.model, windows.length)
    found: dict[PrecisionMap, Outcome] = {}
    feasible: list[tuple[PrecisionMap, LanguageModel]] = []
    for one in in_order(converter.components, maps):
        try:
            feasible.append((one, converter.convert(one)))
        except InfeasibleError as error:
            found[one] = error
    ids = windows.ids.to(converter.model.device)
    for first in range(0, len(feasible), most):
        together = feasible[first : first + most]
        nll, kl = _scores(converter, together, ids, expected, before_layer)
        for m, (one, _) in enumerate(together):
            try:
                plain = require_finite(Evaluation(nll[m], windows.predicted))
                found[one] = plain if expected is None else diverged(nll[m], kl[m], windows.predicted)
            except EvaluationError as error:
                found[one] = error
    return [found[one] for one in maps]


def _scores(
    converter: Converter,
    together: Sequence[tuple[PrecisionMap, LanguageModel]],
    ids: Tensor,
    expected: Expected | None,
    before_layer: Callable[[], None] | None,
) -> tuple[Rows, Rows]:
    """Negative log-likelihood and divergence (0 without a reference) of each window for each map, given with
    its model: `[maps, w]`, a few windows at a time."""
    try:
        stack = make_stack(converter, *zip(*together, strict=True))
        count = windows_at_once(ids.device, ids.shape[1], stack.maps)
        shards: list[Tensor] = list(torch.split(ids, count))
        if expected is None:
            nll = np.concatenate(in_parallel(lambda shard: stack.nll(shard, before_layer), shards), axis=1)
            return nll, np.zeros_like(nll)
        score, theirs = scorer_of(expected.model), expected.hidden.split(count)
        every = range(len(shards))
        return _joined(in_parallel(lambda s: stack.compared(shards[s], score, theirs[s], before_layer), every), 1)
    except torch.OutOfMemoryError:
        if len(together) == 1:
            raise
    half = len(together) // 2  # another process has taken the memory that was free
    halves = [_scores(converter, part, ids, expected, before_layer) for part in (together[:half], together[half:])]
    return _joined(halves, 0)


def _joined(parts: Sequence[tuple[Rows, Rows]], axis: int) -> tuple[Rows, Rows]:
    return np.concatenate([nll for nll, _ in parts], axis), np.concatenate([kl for _, kl in parts], axis)


def windows_at_once(device: torch.device, length: int, maps: int) -> int:
    """Windows in one pass of so many maps: on a CPU so few that a thread's activations stay near its core."""
    return _GPU_WINDOWS if device.type == "cuda" else max(1, _SHARD_TOKENS // (length * maps))


def at_once(model: LanguageModel, length: int) -> int:
    """As many maps as memory allows in one pass over windows of so many tokens; at least one."""
    device = model.device
    one = windows_at_once(device, length, 1) * length * token_bytes(model.config)
    return max(1, free_bytes(device) // one)


def free_bytes(device: torch.device) -> int:
    """Bytes that a stack's activations may take: a fixed share of a GPU's free memory, on a CPU a fixed number."""
    if device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it, empty
    return int(_GPU_SHARE * (free + unused))
