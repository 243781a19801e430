"""What every tool of the comparison is given, and what it must give back, whichever tool it is.

A tool decides about modules of `plain_mamba`; the comparison turns its decisions into precision maps of the study and
measures those, so that all tools are judged by the same conversion, the same windows and the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_mamba import HEAD, PlainMamba, plain_mamba
from search.base.errors import StudyError
from search.problem.workspace import Workspace
from ssm_mp.components import Component
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.kernels.scan import Scan, selective_scan_reference
from ssm_mp.precision_map import PINNED_TO, PrecisionMap
from ssm_mp.precisions.registry import get_precision, precisions_of

BATCH = 8
"""Windows in a batch that a tool is given."""

_LOGIT_TOLERANCE = 1e-3


def _row_bytes(precision: str) -> int:
    """What a row of 128 values takes, a whole number of every size of group."""
    return get_precision(precision).bytes((1, 128), "weight")


@dataclass(frozen=True)
class Decision:
    """What a tool chose: module of the plain model → precision. A module that is not named was left as it is."""

    origin: str
    precisions: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """A tool's answer, and what it cost in forward passes over all search windows."""

    version: str
    decisions: tuple[Decision, ...]
    decides: frozenset[str]
    """Modules that the tool can put to another precision at all."""
    settings: Mapping[str, Any]
    evaluations: float
    counted: str
    """How `evaluations` was counted."""
    seconds: float
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, eq=False)
class Problem:
    """One study as a tool outside the project sees it."""

    workspace: Workspace

    @property
    def config(self) -> MambaConfig:
        """The checkpoint's configuration, its embedding whole. Raises StudyError for another family than `mamba`."""
        config = self.workspace.checkpoint.config
        if not isinstance(config, MambaConfig):
            raise StudyError(f"the comparison builds models of family 'mamba', this checkpoint is {config.family!r}")
        return config

    @property
    def batches(self) -> list[Tensor]:
        """The search windows, `[8, L]` token ids each: a tool may look at what the study's own search looks at."""
        return list(self.workspace.splits.search.ids.split(BATCH))

    @property
    def budget_percent(self) -> float:
        return self.workspace.spec.search.budget_percent

    def model(self, scan: Scan = selective_scan_reference) -> PlainMamba:
        """A fresh plain model of the checkpoint."""
        return plain_mamba(self.config, self.workspace.checkpoint.tensors, scan)

    def logit_difference(self) -> float:
        """Largest difference of the plain model's logits from ours on a batch. Raises StudyError where it is one."""
        ids = self.batches[0]
        with torch.inference_mode():
            difference = float((self.model()(ids) - self.workspace.model(ids)).abs().max())
        if difference > _LOGIT_TOLERANCE:
            raise StudyError(f"the plain model's logits differ from ours by {difference:.3g}: it is another model")
        return difference

    def free_modules(self) -> frozenset[str]:
        """Modules of the plain model that the study does not pin."""
        return frozenset(self._module(c) for c in self._components if c.name not in self.workspace.space.pins)

    def map(self, decision: Decision, decides: Iterable[str], undecided: str) -> PrecisionMap:
        """A decision as a total map of the study; components that the tool cannot decide about get `undecided`.

        A tool's integers of some bits become the best that the study has in as many bytes, such as nf4 for int4.
        """
        within, pins = frozenset(decides), self.workspace.space.pins

        def precision(component: Component) -> str:
            if component.name in pins:
                return PINNED_TO
            module = self._module(component)
            chosen = decision.precisions.get(module, PINNED_TO) if module in within else undecided
            return self._chosen(chosen)

        return PrecisionMap(tuple((component.name, precision(component)) for component in self._components))

    def _chosen(self, precision: str) -> str:
        """The study's choice that takes the bytes of a precision, the best of several; itself where there is none."""
        choices = self.workspace.spec.precision.choices
        alike = (name for name in precisions_of(get_precision(precision).bits) if name in choices)
        width = _row_bytes(precision)
        return next((name for name in alike if _row_bytes(name) == width), precision)

    @property
    def _components(self) -> tuple[Component, ...]:
        return self.workspace.space.components

    def _module(self, component: Component) -> str:
        """The plain model's module that holds a component; every block of a tied embedding is in the head."""
        return HEAD if component.kind == "embedding" and self.config.tied else component.name
