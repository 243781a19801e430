"""What a study works on, loaded once: checkpoint, windows, calibrated converter, search space."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from search.base.errors import StudyError
from search.base.progress import slow
from search.problem.calibrating import Calibrating, blocks_digest
from search.problem.calibration import statistics_of
from search.problem.grouping import grouped_by_rule, require_patterns, rule_of, told
from search.problem.groups import GROUPS, Groups, recorded
from search.problem.judge import Judge
from search.problem.memory import MemoryPlan, needs_of, plan_memory, put_aside
from search.problem.preparation import preparation_of
from search.problem.rounding import compensates, recorded_rounding, rounded_weights
from search.problem.run_directory import GROUPING, mark_of
from search.problem.space import Space, make_space
from search.problem.spec import StudySpec
from search.problem.splits import Say, load_splits, tokenizer_json, window_length
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import Component, find_components
from ssm_mp.config import Config
from ssm_mp.conversion.calibrate import hardly_reached
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.conversion.forms import Forms
from ssm_mp.conversion.prepare import Prepared
from ssm_mp.conversion.regroup import grouping_of, regrouped
from ssm_mp.data import Splits
from ssm_mp.errors import CheckpointError
from ssm_mp.evaluation.memory import keep_freed_memory, let_go_of
from ssm_mp.files.mapped import end_clearly
from ssm_mp.files.shown import listed
from ssm_mp.kernels.calls import compiled
from ssm_mp.kernels.matrices import multiplies_by_amx
from ssm_mp.model import AfterLayer, LanguageModel, build
from ssm_mp.precision_map import PrecisionMap, pinned_names
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.capability import holds, not_worth, sized
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.registry import get_format
from ssm_mp.runtimes.running import require_writer


@dataclass(frozen=True, eq=False)
class Workspace:
    """Everything that turns a precision map into a number."""

    spec: StudySpec
    checkpoint: Checkpoint
    model: LanguageModel
    splits: Splits
    converter: Converter
    space: Space
    memory: MemoryPlan
    compensates: bool = False
    prepared: Prepared | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What a study's results depend on; resuming with another is refused.

        The certify windows are not in it: an inconclusive certificate may be repeated with more of them.
        """
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """Made once: digests read all weights and windows."""
        blocks = {"embedding blocks": blocks_digest(self.model)} if self.spec.precision.embedding_blocks else {}
        search = self.spec.search
        shape = {"batch": search.latency_batch, "length": search.latency_length or self.splits.search.length}
        latency = {"latency": shape} if search.asks_latency else {}
        grouping, rule = grouping_of(self.checkpoint.config), rule_of(self.spec.precision)
        return {
            "checkpoint": self.checkpoint.digest,
            "search windows": self.splits.search.digest,
            "calibration windows": self.splits.calibration.digest,
            "scheme": self.spec.precision.scheme.to_json(),
            "space": self.space.to_json(),
            **({} if self.spec.export.target is None else {"target": self.spec.export.target}),
            **({} if search.metric == "perplexity" else {"metric": search.metric}),
            "compute": _compute_type(self.spec.search.device),
            **recorded_rounding(self.spec, self.compensates),
            **blocks,
            **latency,
            **({GROUPING: grouping} if grouping else {}),
            **({GROUPS: recorded(rule, self._groups)} if rule else {}),
            **({} if self.prepared is None else {"prepared": self.prepared.digest}),
        }

    @property
    def _groups(self) -> Groups | None:
        """Those of the space; None where they are to be made of probes that are still to be measured."""
        return None if self.spec.precision.group == "auto" and self.space.apart is None else self.space.groups

    def grouped(self, groups: Groups) -> Workspace:
        """The same with components that move together."""
        return replace(self, space=self.space.grouped(groups))

    @property
    def ungrouped(self) -> Workspace:
        """The same study before its groups were made."""
        return replace(self, space=self.space.apart or self.space)

    @property
    def apart(self) -> Workspace:
        """The study without groups, whatever it says: its fingerprint marks what does not depend on them."""
        precision = self.spec.precision.model_copy(update={"group": "none", "groups": ()})
        return replace(self.ungrouped, spec=self.spec.model_copy(update={"precision": precision}))

    @property
    def at_the_ends(self) -> Workspace:
        """`apart` where both ends have the same maps in it: what is measured of them does not depend on groups."""
        apart = self.apart
        mine, theirs = ((one.space.widest(), one.space.lowest()) for one in (self, apart))
        return apart if mine == theirs else self

    @cached_property
    def fingerprint_digest(self) -> str:
        """The fingerprint as one short word, to mark what was measured under it."""
        return mark_of(self.fingerprint())

    @cached_property
    def judge(self) -> Judge:
        """What the study judges models by on its search windows."""
        return Judge(self.model, self.splits.search, self.spec.search.metric)


def open_workspace(spec: StudySpec, say: Say = lambda line: None, cache: Path | None = None) -> Workspace:
    """Load what a study names; `say` gets a line before each slow step. Raises SsmMpError for what does not fit.

    cache: folder in which calibration is kept, and the token ids of a long text.
    """
    device = check_device(spec.search.device)
    checkpoint = study_checkpoint(spec)
    for note in checkpoint.notes:
        say(f"note: {note}")
    target = target_of(spec, checkpoint.config)
    model, plan = fp32_model(spec, checkpoint, device, say)
    splits = load_splits(spec, checkpoint.config, say, cache)
    model = split_embedding(model, splits.token_counts, spec.precision.embedding_blocks)
    components = find_components(model)
    pins = pinned_names(components, spec.precision.unpin) | _extra_pins(spec, model)
    require_patterns(spec.precision.groups, components, pins)
    scheme = spec.precision.scheme
    given = Calibrating(spec, checkpoint, model, splits.calibration, _compute_type(spec.search.device), say, cache)
    prepared = preparation_of(given)
    if prepared is not None:
        given = given.folded(prepared)
        model = given.model
    statistics = None
    if scheme.activations == "static":
        statistics = statistics_of(given)
        few = hardly_reached(statistics)
        if few:
            say(f"note: experts that calibration hardly reaches, {listed(few, 4)}; more calibration windows reach more")
    weights = _rounded(given, pins, plan)
    forms = Forms(plan.forms, plan.scratch)
    # the magnitudes in the file are not those of tensors that are cut up, or scaled
    largest = {} if spec.precision.embedding_blocks or prepared is not None else checkpoint.reading.largest
    config = checkpoint.config
    own = None if target is None else sized(target, components, config)
    converter = Converter(model, scheme, statistics, own, forms, _steps, largest, weights)

    def left_out(component: Component, asked: tuple[str, ...]) -> dict[str, str]:
        return {} if target is None else not_worth(target, component, asked, config)

    space = make_space(converter, spec.precision.choices, pins, left_out)
    space = grouped_by_rule(space, spec.precision)
    for line in (*space.never(), *space.narrowed()):
        say(f"note: {line}")
    if space.groups:
        say(told(space))
    return Workspace(spec, checkpoint, model, splits, converter, space, plan, weights is not None, prepared)


def _rounded(given: Calibrating, pins: Container[str], plan: MemoryPlan) -> Mapping[tuple[str, str], Stored] | None:
    """Weights whose rounding is compensated, of the components that are not pinned; None where all are rounded to the
    nearest."""
    free = [component for component in find_components(given.model) if component.name not in pins]
    return rounded_weights(given, free) if compensates(given.spec, free, plan, given.say) else None


def _steps(stage: str, total: int) -> Callable[[], None]:
    """Progress of a stage that is mostly short."""
    return slow(stage, total).step


def _after_layer(checkpoint: Checkpoint) -> AfterLayer:
    """What is done after each layer of a large model: pages and freed memory go back, and files must still be there."""
    end_clearly(
        f"error: {checkpoint.path}: a file that its tensors are mapped from, or a scratch file, cannot be read any "
        "more (bus error); restore it and start the same command again, what was measured so far is kept\n",
        CheckpointError.exit_code,
    )

    def passed(part: nn.Module) -> None:
        checkpoint.require_files()
        let_go_of(part)

    return passed


def fp32_model(
    spec: StudySpec, checkpoint: Checkpoint, device: torch.device, say: Say = lambda line: None
) -> tuple[LanguageModel, MemoryPlan]:
    """A checkpoint's model as it is evaluated within the memory that a study may take."""
    plan = plan_of(spec, checkpoint)
    if plan.sentence:
        say(plan.sentence)
    keep_freed_memory(plan.kept)
    after_layer = _after_layer(checkpoint) if plan.layer_by_layer else None
    return build(checkpoint.config, checkpoint.tensors, after_layer=after_layer).to(device), plan


def plan_of(spec: StudySpec, checkpoint: Checkpoint) -> MemoryPlan:
    """How a study keeps below the memory that it may take."""
    components = find_components(checkpoint)
    return plan_memory(spec, needs_of(spec, checkpoint, components, window_length(spec, checkpoint.config)))


def target_of(spec: StudySpec, config: Config) -> Format | None:
    """The format that a study is for. Raises StudyError where it cannot hold the maps that the study asks for, or its
    tokenizer, and MissingError where it cannot be written here."""
    if spec.export.target is None:
        return None
    format_ = get_format(spec.export.target)
    require_writer(format_)
    refused = format_.refusal(config)
    if refused is not None:
        raise StudyError(f"[export] target = {format_.word!r}: {refused}")
    tokenizer = tokenizer_json(spec, config)
    refused = None if tokenizer is None else format_.refusal_of_tokenizer(tokenizer, config)
    if refused is not None:
        raise StudyError(
            f"[export] target = {format_.word!r}: {refused}; a text of token ids (.npy) goes without a tokenizer"
        )
    components = find_components(_Configured(config))
    free = [component for component in components if component.pin is None]
    for precision in spec.precision.choices:
        if not any(holds(format_, component, precision, config) for component in free):
            raise StudyError(
                f"[export] target = {format_.word!r} holds no component of this model at {precision}; take it out of "
                "[precision] choices (`ssm-mp formats CHECKPOINT` shows what is held)"
            )
    return format_


@dataclass(frozen=True)
class _Configured:
    """Just a config, to list the components of."""

    config: Config


def study_checkpoint(spec: StudySpec) -> Checkpoint:
    """The checkpoint that a study names, its components as the study asks for."""
    checkpoint = load_checkpoint(spec.checkpoint_path, spec.checkpoint.weights)
    place = put_aside(spec, checkpoint) if spec.precision.experts is not None else None
    return regrouped(checkpoint, spec.precision.experts, spec.precision.split, *([] if place is None else [place]))


def _extra_pins(spec: StudySpec, model: LanguageModel) -> frozenset[str]:
    """Components that the study itself keeps at fp16."""
    if not spec.precision.pin:
        return frozenset()
    components = find_components(model)
    rules = {"*": "int8"} | dict.fromkeys(spec.precision.pin, "fp16")
    resolved = PrecisionMap.from_rules(rules, components, frozenset())
    return frozenset(name for name, precision in resolved if precision == "fp16")


def check_device(name: str) -> torch.device:
    """A torch device that this machine has. Raises StudyError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise StudyError(f"[search] device = {name!r} cannot be used here: {reason}") from None
    return device


def _compute_type(device: str) -> str:
    """What results depend on of the machine: a CPU's vector instructions and whether it has a compiler, a GPU's model.

    Rounding differs between them, and inputs that are rounded to int8 amplify it.
    """
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)} float32"
    by = ""
    if compiled():
        by = " kernels amx" if multiplies_by_amx() else " kernels"
    return f"cpu {torch.backends.cpu.get_cpu_capability()} float32{by}"
