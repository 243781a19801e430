"""Windows → what a model is judged by there: its likelihoods, or its divergence from FP32 as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from search.base.metric import Word
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.evaluation.compare import Expected, diverge, expect, finish_diverged
from ssm_mp.evaluation.evaluate import Evaluation, Prefix, evaluate, finish, layer_calls
from ssm_mp.evaluation.prefix_cache import Prefixes
from ssm_mp.evaluation.stack import Outcome, evaluate_stacked
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap

Before = Callable[[], None] | None
"""Called before each layer; what it raises ends an evaluation."""


class Judge:
    """Evaluates models on some windows in the sense of a metric.

    FP32's last hidden states `[w, L, d]`, which divergences take, are computed when they are first needed, then kept.
    """

    def __init__(self, model: LanguageModel, windows: Windows, metric: Word) -> None:
        """model: FP32."""
        self._model, self._windows, self._metric = model, windows, metric
        self._expected: Expected | None = None

    @property
    def windows(self) -> Windows:
        """What models are evaluated on."""
        return self._windows

    def expected(self, before_layer: Before = None, at: np.ndarray | None = None) -> Expected | None:
        """FP32 on the windows with numbers `at` (None: all); None where the metric does not ask for it."""
        if self._metric == "perplexity":
            return None
        if self._expected is None:
            self._expected = expect(self._model, self._windows, before_layer)
        return self._expected if at is None else self._expected.at(at)

    def layer_calls(self, model: LanguageModel, at: np.ndarray | None = None) -> int:
        """How often evaluating a model on the windows with numbers `at` (None: all) calls `before_layer`; FP32 on all
        of them with it where it was not yet."""
        calls = layer_calls(model, self._part(at))
        if self._metric == "perplexity" or self._expected is not None:
            return calls
        return calls + layer_calls(self._model, self._windows)

    def __call__(
        self,
        model: LanguageModel,
        at: np.ndarray | None = None,
        before_layer: Before = None,
        prefixes: Prefixes | None = None,
    ) -> Evaluation:
        """Evaluate a model on the windows with numbers `at` (None: all). Raises EvaluationError as `evaluate` does."""
        expected, windows = self.expected(before_layer, at), self._part(at)
        if expected is None:
            return evaluate(model, windows, before_layer, prefixes)
        return diverge(model, windows, expected, before_layer, prefixes)

    def finish(self, model: LanguageModel, final: Prefix) -> Evaluation:
        """The same of all windows from the last hidden states alone."""
        expected = self.expected()
        if expected is None:
            return finish(model, final, self._windows)
        return finish_diverged(model, final, self._windows, expected)

    def stacked(
        self, converter: Converter, maps: Sequence[PrecisionMap], at: np.ndarray | None, before_layer: Before
    ) -> list[Outcome]:
        """The same of several maps in one pass."""
        expected = self.expected(before_layer, at)
        return evaluate_stacked(converter, maps, self._part(at), before_layer, expected=expected)

    def _part(self, at: np.ndarray | None) -> Windows:
        return self._windows if at is None else self._windows.part(at)
