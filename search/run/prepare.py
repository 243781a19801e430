"""What trials need before they start: baseline, both ends, probes, surrogate, seeds.

Any number of processes may prepare one study at once: what one has measured the others read, and probes are shared
out by the layer and the end that they depart from. What a former run measured is not measured again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from search.base.certifiable import Certifying
from search.base.file_lock import FileLock
from search.base.progress import Progress
from search.base.stop import Stop
from search.measure.latency import latency_table
from search.measure.objective import Baseline, require_knowing
from search.measure.probe import (
    GRADIENT,
    LOWEST,
    WIDEST,
    Group,
    Probe,
    gathered,
    groups,
    missing,
    planned,
    probe_from_stored,
    run_group,
)
from search.problem.run_directory import PROBES, RunDirectory
from search.problem.space import Space
from search.problem.spec import StudySpec
from search.problem.workspace import Workspace, open_workspace
from search.results.ledger import error_share
from search.run.claim import Seed
from search.run.components import keep_components
from search.run.ends import Ends, measured_ends
from search.run.gradients import measured_gradients
from search.run.grouping import grouped_by_probes
from search.run.widening import check_or_widen
from search.sampling.catalogue import catalogue_of
from search.sampling.knowledge import Knowledge, before_any_trial
from search.sampling.surrogate import Surrogate, additive, effects_of_size, fit, predicted_front
from ssm_mp.evaluation.latency import LatencyTable
from ssm_mp.precision_map import EIGHT_BIT, FOUR_BIT, PRESETS, PrecisionMap
from ssm_mp.precisions.registry import precisions_of

Say = Callable[[str], None]
"""Told a line for people before each slow step."""

MANY_PROBES = 64
"""More probes than these are left to the workers by a step that only prepares."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What trials need: the loaded study, its baseline, the surrogate of its probes, its latencies if any.

    began: when this process began to prepare, by the clock.
    """

    workspace: Workspace
    baseline: Baseline
    probes: list[Probe]
    surrogate: Surrogate
    knowledge: Knowledge
    latency: LatencyTable | None = None
    began: float = field(default_factory=time.time)

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The precisions of free components and groups: what a trial's parameters may be."""
        return self.workspace.space.moves


def prepare(spec: StudySpec, run: RunDirectory, say: Say, stop: Stop | None = None) -> Prepared:
    """Load, check the fingerprint, measure what is missing of baseline and probes, together with whoever else does.

    Raises StudyError where the run belongs to a study with another fingerprint, WorkInterruptedError where `stop` asks.
    """
    study = _Preparation.begin(spec, run, say, Stop() if stop is None else stop)
    probes = study.all_probes()
    return study.prepared(probes)


def prepare_alone(spec: StudySpec, run: RunDirectory, say: Say, stop: Stop) -> Prepared | None:
    """The step before many workers: all of it, or where there are many probes all but those; then None."""
    study = _Preparation.begin(spec, run, say, stop)
    if spec.search.probe == "measured" and planned(study.workspace) > MANY_PROBES:
        say(f"{planned(study.workspace)} probes are left to the workers")
        return None
    return study.prepared(study.all_probes())


@dataclass(frozen=True, eq=False)
class _Preparation:
    """A study that is being prepared. `offsets`: log-increase of the widest and of the lowest map."""

    workspace: Workspace
    run: RunDirectory
    say: Say
    stop: Stop
    baseline: Baseline
    offsets: tuple[float, float]
    latency: LatencyTable | None
    began: float
    ends: Ends

    @classmethod
    def begin(cls, spec: StudySpec, run: RunDirectory, say: Say, stop: Stop) -> _Preparation:
        began = time.time()
        workspace = open_workspace(spec, say, run.path)
        if spec.precision.group == "auto":
            before, alone = Ends(workspace), workspace
            workspace = grouped_by_probes(alone, run, lambda: _probes_to_group(alone, run, before, say, stop), say)
            before.close()
        check_or_widen(spec, run, workspace.fingerprint(), say)
        keep_components(run, workspace)
        ends = Ends(workspace)
        with run.lock("prepare").awaited(stop.check):  # one measures, the others read
            baseline, offsets = measured_ends(run, workspace, ends, say)
            latency = latency_table(run, workspace, say, stop) if spec.search.asks_latency else None
        if doubt := require_knowing(workspace, baseline.evaluation):
            say(f"note: {doubt}")
        say(
            f"baseline: perplexity {baseline.perplexity:.4f} on {baseline.evaluation.windows} windows, "
            f"{baseline.bytes:,} bytes in FP32"
        )
        if spec.search.probe != "measured":
            ends.close()
        return cls(workspace, run, say, stop, baseline, offsets, latency, began, ends)

    def _stored(self) -> list[Probe]:
        """Probes that were measured under this fingerprint."""
        return [probe for probe in _stored_probes(self.run, self.workspace) if probe.end != GRADIENT]

    def all_probes(self) -> list[Probe]:
        """The study's probes, in an order that does not depend on who measured them."""
        kind = self.workspace.spec.search.probe
        if kind == "none":
            return []
        if kind == "gradient":
            with self.run.lock("prepare").awaited(self.stop.check):
                single = _gradient_probes(self.run, self.workspace.apart, self.stop)
            found = gathered(single, self.workspace.space.choices, self.workspace.space.groups)
        else:
            self._measure_probes()
            found = self._stored()
        by_key = {(probe.end, probe.component, probe.precision): probe for probe in found}
        return [by_key[key] for key in sorted(by_key)]

    def _measure_probes(self) -> None:
        """Measure the groups of probes that nobody has taken; then, in case a worker died, what is still missing."""
        done = self._stored()
        every = [group for group in groups(self.workspace) if missing(self.workspace, group, done)]
        if not every:
            return
        progress = Progress("probes", planned(self.workspace), len(done))
        for group in every:
            with self._lock(group).tried() as free:
                if free:
                    self._measure(group, progress)
        for group in every:
            if missing(self.workspace, group, self._stored()):
                with self._lock(group).awaited(self.stop.check):
                    self._measure(group, progress)
        progress.close()
        self.ends.close()

    def _measure(self, group: Group, progress: Progress) -> None:
        done = self._stored()
        if not missing(self.workspace, group, done):  # by others meanwhile
            return
        for probe in run_group(self.workspace, self.ends[group.end], group, done, self.stop.check):
            _save(self.run, self.workspace, [probe])
            progress.step()

    def _lock(self, group: Group) -> FileLock:
        return self.run.lock(f"probes-{group.end}-{group.stage}")

    def prepared(self, probes: list[Probe]) -> Prepared:
        """With the surrogate of the probes."""
        space, offsets, metric = self.workspace.space, self.offsets, self.workspace.spec.search.judged
        if self.workspace.spec.search.probe == "none":
            surrogate = additive(space, effects_of_size(space, *offsets), *offsets)
        else:
            surrogate = fit(space, probes, *offsets)
        self.say(
            f"probes: {len(probes)}; all-lowest costs {metric.said(100 * math.expm1(offsets[1]), 3)}, "
            f"the sum of effects misses that by {metric.said_log(surrogate.gap, 3)}"
        )
        knowledge = _knowledge(self.workspace, surrogate, probes, offsets, self.latency)
        return Prepared(self.workspace, self.baseline, probes, surrogate, knowledge, self.latency, self.began)


def _stored_probes(run: RunDirectory, workspace: Workspace) -> list[Probe]:
    """Probes that were measured under a study's fingerprint."""
    mark = workspace.fingerprint_digest
    lines = [line for line in run.read_lines(PROBES) if line["fingerprint"] == mark]
    return [probe_from_stored(line["probe"]) for line in lines]


def _save(run: RunDirectory, workspace: Workspace, probes: Iterable[Probe]) -> None:
    mark = workspace.fingerprint_digest
    run.append_lines(PROBES, [{"fingerprint": mark, "probe": probe.stored()} for probe in probes])


def _gradient_probes(run: RunDirectory, apart: Workspace, stop: Stop) -> list[Probe]:
    """The gradient probes of single components, measured where nobody did. Under the lock."""
    stored = [probe for probe in _stored_probes(run, apart) if probe.end == GRADIENT]
    if not stored:
        stored = measured_gradients(run, apart, stop)
        _save(run, apart, stored)
    return stored


def _probes_to_group(workspace: Workspace, run: RunDirectory, ends: Ends, say: Say, stop: Stop) -> list[Probe]:
    """The gradient probes that groups are made of; after the baseline, which may end a study at once."""
    with run.lock("prepare").awaited(stop.check):
        measured_ends(run, workspace, ends, say)
        return _gradient_probes(run, workspace.apart, stop)


def _knowledge(
    workspace: Workspace,
    surrogate: Surrogate,
    probes: Sequence[Probe],
    offsets: Sequence[float],
    latency: LatencyTable | None,
) -> Knowledge:
    """What the sampler starts from: expected effects, and all maps that probes and ends have measured."""
    space: Space = workspace.space
    ends = {WIDEST: (space.widest(), offsets[0]), LOWEST: (space.lowest(), offsets[1])}
    measured = [(space.chosen(held), offset) for held, offset in ends.values()]
    for probe in probes:
        if probe.end in ends:
            held, offset = ends[probe.end]
            measured.append(({**space.chosen(held), probe.component: probe.precision}, offset + probe.log_increase))
    catalogue = catalogue_of(space, workspace.spec.precision.activations, latency)
    return replace(before_any_trial(catalogue, surrogate.effects, measured), certifying=certifying_of(workspace))


def certifying_of(workspace: Workspace) -> Certifying:
    """How the study will be certified, as far as that is known before any trial."""
    splits = workspace.splits
    error = error_share(1, 1 - workspace.spec.search.confidence)
    return Certifying(len(splits.certify), error, splits.search.sources, splits.certify.sources)


def seeds(prepared: Prepared) -> list[Seed]:
    """The study's first maps: both ends, the presets, then the surrogate's predicted front.

    With latency half of those are by size, a quarter by latency, and a quarter by both.
    """
    space, spec = prepared.workspace.space, prepared.workspace.spec
    found: list[tuple[PrecisionMap, str]] = [
        (space.widest(), f"uniform {spec.precision.choices[0]}"),
        (space.lowest(), f"uniform {spec.precision.choices[-1]}"),
    ]
    eight_bit, four_bit = (
        next((name for name in precisions_of(bits) if name in spec.precision.choices), None) for bits in (8, 4)
    )
    for name in PRESETS:
        if name != "cumulative" or four_bit is not None:
            preset = PrecisionMap.preset(
                name, space.components, four_bit=four_bit or FOUR_BIT, eight_bit=eight_bit or EIGHT_BIT
            )
            found.append((space.within(preset), name))
    named = [Seed(space.chosen(precision_map), origin) for precision_map, origin in found]
    budget = math.log1p(spec.search.budget_percent / 100)
    catalogue, count = prepared.knowledge.catalogue, spec.search.seeds
    shares = [(catalogue, count)]
    if catalogue.latencies is not None:
        part = count // 4
        shares = [(catalogue, count - 2 * part), (catalogue.by_latency, part), (catalogue.blended(0.5), part)]
    predicted = [params for axis, n in shares for params in predicted_front(prepared.surrogate, axis, n, budget)]
    return named + [Seed(params, "predicted front") for params in predicted]
