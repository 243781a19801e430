"""One precision map → converted → evaluated → what a trial reports."""

from __future__ import annotations

from dataclasses import dataclass

from search.workspace import Workspace
from ssm_mp.components import fp32_bytes
from ssm_mp.evaluate import Evaluation, Increase, evaluate, paired_increase, require_better_than_guessing
from ssm_mp.precision_map import PrecisionMap


@dataclass(frozen=True, eq=False)
class Measured:
    """Size and quality of one map on the search windows."""

    bytes: int
    compression: float
    perplexity: float
    increase: Increase


@dataclass(frozen=True, eq=False)
class Baseline:
    """The FP32 checkpoint on the search windows."""

    evaluation: Evaluation
    bytes: int

    @property
    def perplexity(self) -> float:
        return self.evaluation.perplexity


def measure_baseline(workspace: Workspace) -> Baseline:
    """Evaluate the FP32 checkpoint. Raises EvaluationError where it is not finite or no better than guessing."""
    evaluation = evaluate(workspace.model, workspace.splits.search)
    require_better_than_guessing(evaluation, workspace.checkpoint.config.vocabulary)
    return Baseline(evaluation, fp32_bytes(workspace.converter.components))


class Objective:
    """Converts and evaluates maps of one workspace."""

    def __init__(self, workspace: Workspace, baseline: Baseline) -> None:
        self._workspace = workspace
        self._baseline = baseline

    def __call__(self, precision_map: PrecisionMap) -> Measured:
        """Really convert, really evaluate. Raises EvaluationError where the result is not finite."""
        workspace = self._workspace
        model = workspace.converter.convert(precision_map)
        evaluation = evaluate(model, workspace.splits.search)
        size = precision_map.bytes(workspace.space.components, workspace.spec.precision.activations)
        return Measured(
            bytes=size,
            compression=self._baseline.bytes / size,
            perplexity=evaluation.perplexity,
            increase=paired_increase(evaluation, self._baseline.evaluation),
        )
