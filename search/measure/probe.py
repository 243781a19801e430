"""Sensitivity of each component to each precision, measured from both ends.

From all-widest, one component is lowered; from all-lowest, one is raised. Everything before the layer
where it acts is the same as in the map it departs from, so those activations are computed once a layer, and the
probes that share them are one group, the unit that workers share out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from search.problem.groups import Groups
from search.problem.space import Unit
from search.problem.workspace import Workspace
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Evaluation, Prefix, advance, finish_against, paired_increase, start
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap

WIDEST, LOWEST, GRADIENT = "widest", "lowest", "gradient"
"""Where a probe comes from: one of the two ends, or no evaluated map but the gradient."""


@dataclass(frozen=True)
class Probe:
    """One measurement: `component` put to `precision` while all others stand as at the `end` it departs from.

    A group of components that move together is one `component` here, under its own name.

    `origin` is the component's own precision there. `log_increase` and `log_stderr` are of log-perplexity, or of the
    divergence from FP32 where the study judges by that, paired by window, against the map it departs from (so raising a
    component gives a negative increase); `kl` is the divergence from that map (or FP32, likewise) in nats a token, None
    where it is an estimate from gradients.
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
    return sum(2 * (len(unit.choices) - 1) for unit in workspace.space.units)


def open_end(workspace: Workspace, name: str, before_layer: Callable[[], None] | None = None) -> End:
    """Convert and evaluate one end, keeping its last hidden states; `before_layer` as in `evaluate`."""
    space, windows = workspace.space, workspace.splits.search
    precision_map = space.widest() if name == WIDEST else space.lowest()
    model = workspace.converter.convert(precision_map)
    workspace.judge.expected(before_layer)
    final = advance(model, start(model, windows), len(model.layers), before_layer)
    return End(name, precision_map, model, workspace.judge.finish(model, final), final, Walk(model, windows))


@dataclass(frozen=True)
class Group:
    """Probes that share a prefix: from one end, of what begins to act at one stage."""

    end: str
    stage: int


def groups(workspace: Workspace) -> list[Group]:
    """All groups of a study's probes, in the order of the data flow."""
    stages = sorted({unit.stage for unit in workspace.space.units})
    return [Group(end, stage) for end in (WIDEST, LOWEST) for stage in stages]


def missing(workspace: Workspace, group: Group, done: Iterable[Probe]) -> list[tuple[Unit, str]]:
    """What moves at which precisions of a group that was not measured yet."""
    space = workspace.space
    known = {(probe.component, probe.precision, probe.end) for probe in done}
    return [
        (unit, precision)
        for unit in space.units
        if unit.stage == group.stage
        for precision in unit.choices
        if precision != _at(group.end, unit) and (unit.name, precision, group.end) not in known
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
    for unit, precision in wanted:
        yield _measure(workspace, end, unit, precision, prefix, check)


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


def _at(end: str, unit: Unit) -> str:
    """The precision that a unit has at an end."""
    return unit.choices[0 if end == WIDEST else -1]


def _measure(
    workspace: Workspace, end: End, unit: Unit, precision: str, prefix: Prefix, check: Callable[[], None]
) -> Probe:
    windows = workspace.splits.search
    model = workspace.converter.convert(end.map.changed({member.name: precision for member in unit.members}))
    begin = prefix if unit.stage > 0 else start(model, windows)
    final = advance(model, begin, len(model.layers) - begin.layer, before_layer=check)
    try:
        if workspace.spec.search.metric == "perplexity":
            evaluation, kl = finish_against(end.model, end.final, model, final, windows)
        else:
            evaluation = workspace.judge.finish(model, final)
            kl = float(evaluation.cost.sum()) / evaluation.tokens
    except EvaluationError as error:
        raise EvaluationError(f"probe of {unit.name} at {precision} (from {end.name}): {error}") from None
    increase = paired_increase(evaluation, end.evaluation)
    return Probe(unit.name, precision, end.name, _at(end.name, unit), increase.log_mean, increase.log_stderr, kl)


def probe_from_stored(values: Mapping[str, Any]) -> Probe:
    """Inverse of `Probe.stored`."""
    return Probe(**values)


def gathered(probes: Iterable[Probe], choices: Mapping[str, Sequence[str]], groups: Groups) -> list[Probe]:
    """Gradient probes of single components as those of what moves: a group's effects are the sums of its members'.

    choices: every component's in the grouped space. Standard errors are combined as of independent errors.
    """
    held = {(probe.component, probe.precision): probe for probe in probes}
    group_of = {member: name for name, members in groups.items() for member in members}
    found = [probe for (name, precision), probe in held.items() if name not in group_of and precision in choices[name]]
    for name, members in groups.items():
        top = choices[members[0]][0]
        for precision in choices[members[0]][1:]:
            parts = [held[member, precision] for member in members]
            # a member's own widest may be wider than the group's
            above = [held[member, top] for member in members if (member, top) in held]
            increase = math.fsum(p.log_increase for p in parts) - math.fsum(p.log_increase for p in above)
            found.append(
                Probe(name, precision, GRADIENT, top, increase, math.hypot(*(p.log_stderr for p in parts)), None)
            )
    return found
