"""A model beside a reference: divergences and changed top tokens of windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.compare import Diverged, depart, diverge, diverged, expect, finish_diverged
from ssm_mp.evaluation.evaluate import Evaluation, advance, evaluate, paired_increase, start
from ssm_mp.evaluation.prefix_cache import PrefixCache, Prefixes
from ssm_mp.evaluation.stack import evaluate_stacked
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, MAMBA, random_model, random_tensors, some_windows


@dataclass(frozen=True, eq=False)
class Slowly:
    """The readable reference: whole logits in float64, token by token. Sums over windows `[w]`."""

    kl: np.ndarray
    changed: np.ndarray


def slowly(reference: LanguageModel, model: LanguageModel, windows: Windows) -> Slowly:
    kl, changed = np.zeros(len(windows)), np.zeros(len(windows))
    with torch.inference_mode():
        for w, ids in enumerate(windows.ids):
            logits = [one(ids[None])[0, :-1].double() for one in (reference, model)]
            for theirs, ours in zip(*logits, strict=True):
                p, q = theirs.log_softmax(0), ours.log_softmax(0)
                kl[w] += float((p.exp() * (p - q)).sum())
                changed[w] += int(theirs.argmax()) != int(ours.argmax())
    return Slowly(kl, changed)


def converted(reference: LanguageModel, precision: str) -> LanguageModel:
    components = find_components(reference)
    return Converter(reference, Scheme("none"), None).convert(PrecisionMap.uniform(precision, components))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_divergences_and_changed_tokens_are_those_of_whole_logits(family: str, precision: str) -> None:
    reference, windows = random_model(CONFIGS[family]), some_windows(6)
    model = converted(reference, precision)
    found, slow = depart(model, windows, expect(reference, windows)), slowly(reference, model, windows)
    np.testing.assert_allclose(found.kl, slow.kl, rtol=1e-3, atol=2e-5)
    assert np.array_equal(found.changed, slow.changed)
    assert np.array_equal(found.nll, evaluate(model, windows).nll)


def test_a_coarse_map_changes_some_top_tokens_and_not_all() -> None:
    reference, windows = random_model(MAMBA), some_windows(8)
    found = depart(random_model(MAMBA, seed=1), windows, expect(reference, windows))
    assert 0 < found.changed.sum() < found.tokens
    assert found.changed.max() <= found.predicted


def test_a_model_does_not_depart_from_itself() -> None:
    model, windows = random_model(MAMBA), some_windows(5)
    found = depart(model, windows, expect(model, windows))
    assert found.changed.sum() == 0
    assert np.abs(found.kl).max() < 1e-5
    assert (found.kl >= 0).all()


def test_layer_by_layer_prefixes_last_states_and_stacks_all_tell_the_same() -> None:
    reference, windows = random_model(MAMBA), some_windows(9)
    model = converted(reference, "int8")
    expected = expect(reference, windows)
    whole = diverge(model, windows, expected)
    seen: list[nn.Module] = []
    large, large_reference = (build(MAMBA, random_tensors(MAMBA, seed), after_layer=seen.append) for seed in (1, 0))
    by_layer = diverge(large, windows, expect(large_reference, windows))
    small = diverge(random_model(MAMBA, 1), windows, expected)
    assert np.array_equal(by_layer.kl, small.kl)
    assert len(seen) >= 2 * len(reference.layers)
    final = advance(model, start(model, windows), len(model.layers))
    assert np.array_equal(finish_diverged(model, final, windows, expected).kl, whole.kl)
    prefixes = Prefixes(PrefixCache(1 << 20), [("same",)])
    for _ in range(2):
        assert np.array_equal(diverge(model, windows, expected, prefixes=prefixes).kl, whole.kl)
    converter = Converter(reference, Scheme("none"), None)
    maps = [PrecisionMap.uniform(p, find_components(reference)) for p in ("int8", "fp16", "nf4")]
    for outcome, one in zip(evaluate_stacked(converter, maps, windows, expected=expected), maps, strict=True):
        assert isinstance(outcome, Diverged)
        alone = diverge(converter.convert(one), windows, expected)
        np.testing.assert_allclose(outcome.kl, alone.kl, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outcome.nll, alone.nll, rtol=1e-5)


def test_some_windows_of_a_reference_are_those_windows() -> None:
    reference, windows = random_model(MAMBA), some_windows(7)
    model, at = converted(reference, "nf4"), np.array([5, 0, 3])
    whole = diverge(model, windows, expect(reference, windows))
    part = diverge(model, Windows(windows.ids[torch.from_numpy(at)]), expect(reference, windows).at(at))
    np.testing.assert_allclose(part.kl, whole.kl[at], rtol=1e-5, atol=1e-6)


def test_an_evaluation_that_is_judged_by_divergence_is_compared_by_it() -> None:
    plain = Evaluation(np.array([10.0, 20.0]), 5)
    one, two = (Diverged(np.array([11.0, 19.0]), 5, np.array(kl)) for kl in ([1.0, 2.0], [0.5, 0.5]))
    assert paired_increase(one, plain).log_mean == pytest.approx(0.3)
    assert paired_increase(one, two).log_mean == pytest.approx(0.2)
    assert paired_increase(Evaluation(one.nll, 5), plain).log_mean == pytest.approx(0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_divergence_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(EvaluationError, match="divergence from FP32 is (nan|inf) on 1 of 2 windows"):
        diverged(np.array([1.0, 1.0]), np.array([0.1, value]), 5)
