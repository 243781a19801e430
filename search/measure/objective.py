"""One precision map → converted → evaluated → what a trial reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.measure.racing import Reason, best_rival, judge, next_rung, rungs
from search.problem.workspace import Workspace
from ssm_mp.components import fp32_bytes
from ssm_mp.data import unigram_perplexity
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import Evaluation, Increase, differences, doubt, evaluate, increase_of
from ssm_mp.evaluation.prefix_cache import PrefixCache, Prefixes, Reuse
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap

Finished = Sequence[tuple[int, np.ndarray]]
"""Maps that have seen all windows: bytes, log-increase of each window."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Size and quality of one map on the search windows.

    increase, differences: of what the study judges by. differences: that of each window over FP32, nats a token,
    `[windows seen]`; stopped: why not all `of_windows` were,
    and lower_percent: the least that its increase on all of them can be.
    """

    bytes: int
    compression: float
    perplexity: float
    increase: Increase
    differences: np.ndarray
    of_windows: int
    stopped: Reason | None = None
    lower_percent: float | None = None


@dataclass(frozen=True, eq=False)
class Baseline:
    """The FP32 checkpoint on the search windows."""

    evaluation: Evaluation
    bytes: int

    @property
    def perplexity(self) -> float:
        return self.evaluation.perplexity


def measure_baseline(workspace: Workspace, before_layer: Callable[[], None] | None = None) -> Baseline:
    """Evaluate the FP32 checkpoint. Raises EvaluationError where it is not finite or no better than guessing."""
    evaluation = evaluate(workspace.model, workspace.splits.search, before_layer)
    require_knowing(workspace, evaluation)
    return Baseline(evaluation, fp32_bytes(workspace.converter.components))


def require_knowing(workspace: Workspace, baseline: Evaluation) -> str | None:
    """What speaks against a baseline; raises EvaluationError for it unless the study says `force_baseline`."""
    splits, vocabulary = workspace.splits, workspace.checkpoint.config.vocabulary
    found = doubt(baseline, vocabulary, unigram_perplexity(splits.token_counts, splits.search))
    if found is not None and not workspace.spec.search.force_baseline:
        raise EvaluationError(f"{found}; `--force` (or [search] force_baseline = true) goes on all the same")
    return found


@dataclass(frozen=True, eq=False)
class Seen:
    """Of windows `[n]`, a map's negative log-likelihoods in nats, and its differences from FP32, in nats a token, of
    what the study judges by; NaN where it has not seen one."""

    nll: np.ndarray
    differences: np.ndarray

    @classmethod
    def nothing(cls, windows: int) -> Seen:
        return cls(np.full(windows, np.nan), np.full(windows, np.nan))

    def put(self, at: np.ndarray, found: Seen) -> None:
        """Fill in the windows with numbers `at`."""
        self.nll[at], self.differences[at] = found.nll, found.differences

    def at(self, numbers: np.ndarray) -> Seen:
        """The windows with these numbers."""
        return Seen(self.nll[numbers], self.differences[numbers])


def window_order(workspace: Workspace) -> np.ndarray:
    """In which order the search windows are seen: as they stand, the text's beginning, is no random sample of it."""
    order: np.ndarray = np.random.default_rng(workspace.spec.data.seed).permutation(len(workspace.splits.search))
    return order


class Objective:
    """Converts and evaluates maps of one workspace."""

    def __init__(
        self, workspace: Workspace, baseline: Baseline, before_layer: Callable[[], None] | None = None
    ) -> None:
        """`before_layer` is called before each layer of each evaluation; what it raises ends that."""
        self._workspace = workspace
        self._baseline = baseline
        self._before_layer = before_layer
        self._shared = PrefixCache(workspace.memory.shared)
        self._order = window_order(workspace)

    def __call__(self, precision_map: PrecisionMap) -> Measured:
        """Really convert, really evaluate on all windows. Raises EvaluationError where the result is not finite."""
        model = self._converted(precision_map)
        found = self._workspace.judge(model, None, self._before_layer, self._prefixes(precision_map))
        return self._measured(precision_map, self._seen(found, np.arange(found.windows)))

    def race(self, precision_map: PrecisionMap, finished: Finished, error: float) -> Measured:
        """The same in rungs of windows, stopped where the map shows over budget or beaten by one of `finished`.

        error: chance allowed to stop a map that all windows would have left on the front.
        """
        windows = len(self._workspace.splits.search)
        model, prefixes = self._converted(precision_map), self._prefixes(precision_map)
        rival = best_rival(self._size(precision_map), finished)
        every = Seen.nothing(windows)
        began, count = 0, rungs(windows)[0]
        while True:
            new, seen = self._order[began:count], self._order[:count]
            every.put(new, self._seen(self._workspace.judge(model, new, self._before_layer, prefixes), new))
            if count == windows:
                return self._measured(precision_map, every)
            against = None if rival is None else rival[seen]
            stopped = self._stopped(precision_map, every.at(seen), against, error)
            if stopped is not None:
                return stopped
            began, count = count, self._next_rung(every.at(seen), against, error)

    def _stopped(
        self, precision_map: PrecisionMap, seen: Seen, rival: np.ndarray | None, error: float
    ) -> Measured | None:
        """What a map measured so far, on the windows `seen [n]`, if it is to be stopped."""
        windows = len(self._workspace.splits.search)
        if seen.nll.size == windows:
            return None
        measured = self._measured(precision_map, seen)
        budget = self._workspace.spec.search.budget_percent
        stop = judge(measured.differences, windows, budget, rival, error)
        return None if stop is None else replace(measured, stopped=stop.reason, lower_percent=stop.lower_percent)

    def _next_rung(self, seen: Seen, rival: np.ndarray | None, error: float) -> int:
        """How many windows a map that was not stopped on the windows `seen [n]` is to see next."""
        budget = self._workspace.spec.search.budget_percent
        return next_rung(seen.differences, len(self._workspace.splits.search), budget, rival, error)

    def _seen(self, found: Evaluation, at: np.ndarray) -> Seen:
        """An evaluation of the windows with numbers `at [n]` beside FP32."""
        full = self._baseline.evaluation
        return Seen(found.nll, differences(found, Evaluation(full.nll[at], full.predicted)))

    def _size(self, precision_map: PrecisionMap) -> int:
        """Stored bytes of a map."""
        return precision_map.bytes(self._workspace.space.components, self._workspace.spec.precision.activations)

    @property
    def reuse(self) -> Reuse:
        """How many layers were found computed by a map before, of all."""
        return self._shared.reuse

    def _prefixes(self, precision_map: PrecisionMap) -> Prefixes:
        """Layers' inputs that this map may share with others: they depend on the precisions of all before the layer."""
        components, held = self._workspace.space.components, precision_map.to_json()
        before = [
            tuple(held[component.name] for component in components if component.stage <= layer)
            for layer in range(1, self._workspace.model.config.n_layers)
        ]
        return Prefixes(self._shared, before)

    def _converted(self, precision_map: PrecisionMap) -> LanguageModel:
        return self._workspace.converter.convert(precision_map)

    def _measured(self, precision_map: PrecisionMap, seen: Seen) -> Measured:
        full = self._baseline.evaluation
        size = self._size(precision_map)
        return Measured(
            bytes=size,
            compression=self._baseline.bytes / size,
            perplexity=Evaluation(seen.nll, full.predicted).perplexity,
            increase=increase_of(seen.differences),
            differences=seen.differences,
            of_windows=full.windows,
        )
