"""Sensitivity of each component to each precision, measured from both ends.

From all-widest, one component is lowered; from all-lowest, one is raised. Everything before the layer
where it acts is the same as in the map it departs from, so those activations are computed once a layer, and the
probes that share them are one group, the unit that workers share out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Evaluation, Prefix, advance, finish, finish_against, paired_increase, start
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap

WIDEST, LOWEST, GRADIENT = "widest", "lowest", "gradient"
"""Where a probe comes from: one of the two ends, or no evaluated map but the gradient."""


@dataclass(frozen=True)
class Probe:
    """One measurement: `component` put to `precision` while all others stand as at the `end` it departs from.

    `origin` is the component's own precision there. `log_increase` and `log_stderr` are of log-perplexity,
    paired by window, against the map it departs from (so raising a component gives a negative increase);
    `kl` is the divergence from that map in nats a token, None where it is an estimate from gradients.
    """

    component: str
    precision: str
    end: str
    origin: str
    log_increase: float
    log_stderr: float
    kl: float | None

    def to_json(self) -> dict[str, Any]:
        """With the increase in percent, as the command line reports it."""
        return {
            "component": self.component,
            "precision": self.precision,
            "from": self.origin,
            "increase_percent": 100 * math.expm1(self.log_increase),
            "stderr_percent": 100 * math.exp(self.log_increase) * self.log_stderr,
            "kl": self.kl,
        }

    def stored(self) -> dict[str, Any]:
        return asdict(self)


class Walk:
    """The inputs of a model's layers, one after another: each is computed from the one before, where that is known."""

    def __init__(self, model: LanguageModel, windows: Windows) -> None:
        self._model, self._windows = model, windows
        self._latest: Prefix | None = None

    def to(self, layer: int, check: Callable[[], None]) -> Prefix:
        """The input of a layer; `check` is called before each layer on the way and may raise."""
        latest = self._latest
        if latest is None or latest.layer > layer:
            latest = start(self._model, self._windows)
        self._latest = advance(self._model, latest, layer - latest.layer, before_layer=check)
        return self._latest


@dataclass(frozen=True, eq=False)
class End:
    """One end of the probes: its map, the model, its evaluation, its last hidden states and those on the way there."""

    name: str
    map: PrecisionMap
    model: LanguageModel
    evaluation: Evaluation
    final: Prefix
    walk: Walk


def planned(workspace: Workspace) -> int:
    """How many probes a study has."""
    return sum(2 * (len(workspace.space.choices[c.name]) - 1) for c in workspace.space.free)


def open_end(workspace: Workspace, name: str, before_layer: Callable[[], None] | None = None) -> End:
    """Convert and evaluate one end, keeping its last hidden states; `before_layer` as in `evaluate`."""
    space, windows = workspace.space, workspace.splits.search
    precision_map = space.widest() if name == WIDEST else space.lowest()
    model = workspace.converter.convert(precision_map)
    final = advance(model, start(model, windows), len(model.layers), before_layer)
    return End(name, precision_map, model, finish(model, final, windows), final, Walk(model, windows))


@dataclass(frozen=True)
class Group:
    """Probes that share a prefix: from one end, of the components that act at one stage."""

    end: str
    stage: int


def groups(workspace: Workspace) -> list[Group]:
    """All groups of a study's probes, in the order of the data flow."""
    stages = sorted({component.stage for component in workspace.space.free})
    return [Group(end, stage) for end in (WIDEST, LOWEST) for stage in stages]


def missing(workspace: Workspace, group: Group, done: Iterable[Probe]) -> list[tuple[Component, str]]:
    """Components and precisions of a group that were not measured yet."""
    space = workspace.space
    held = (space.widest() if group.end == WIDEST else space.lowest()).to_json()
    known = {(probe.component, probe.precision, probe.end) for probe in done}
    return [
        (component, precision)
        for component in space.free
        if component.stage == group.stage
        for precision in space.choices[component.name]
        if precision != held[component.name] and (component.name, precision, group.end) not in known
    ]


def run_group(
    workspace: Workspace, end: End, group: Group, done: Iterable[Probe], check: Callable[[], None]
) -> Iterator[Probe]:
    """The missing probes of a group, as they are measured; `check` is called before each layer and may raise."""
    wanted = missing(workspace, group, done)
    if not wanted:
        return
    # stage 0 is what acts at the embedding: nothing before it to reuse
    prefix = end.walk.to(max(0, group.stage - 1), check)
    for component, precision in wanted:
        yield _measure(workspace, end, component, precision, prefix, check)


def run_probes(
    workspace: Workspace, ends: Iterable[End], done: Iterable[Probe], save: Callable[[Probe], None]
) -> list[Probe]:
    """All probes from these ends, in one process: those done before, and the others, each given to `save`."""
    probes, by_name = list(done), {end.name: end for end in ends}
    for group in groups(workspace):
        if group.end in by_name:
            for probe in run_group(workspace, by_name[group.end], group, list(probes), lambda: None):
                save(probe)
                probes.append(probe)
    return probes


def _measure(
    workspace: Workspace, end: End, component: Component, precision: str, prefix: Prefix, check: Callable[[], None]
) -> Probe:
    windows = workspace.splits.search
    model = workspace.converter.convert(end.map.changed({component.name: precision}))
    origin = end.map[component.name]
    begin = prefix if component.stage > 0 else start(model, windows)
    final = advance(model, begin, len(model.layers) - begin.layer, before_layer=check)
    try:
        evaluation, kl = finish_against(end.model, end.final, model, final, windows)
    except EvaluationError as error:
        raise EvaluationError(f"probe of {component.name} at {precision} (from {end.name}): {error}") from None
    increase = paired_increase(evaluation, end.evaluation)
    return Probe(component.name, precision, end.name, origin, increase.log_mean, increase.log_stderr, kl)


def probe_from_stored(values: Mapping[str, Any]) -> Probe:
    """Inverse of `Probe.stored`."""
    return Probe(**values)
