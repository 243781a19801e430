from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.benchmark import benchmark, resident_bytes
from ssm_mp.evaluation.evaluate import (
    Evaluation,
    advance,
    evaluate,
    finish,
    finish_against,
    paired_increase,
    require_better_than_guessing,
    start,
)
from ssm_mp.evaluation.prefix_cache import PrefixCache, Prefixes
from ssm_mp.kernels import calls
from ssm_mp.model import LanguageModel, assemble, build
from ssm_mp.modules.likelihood import Likelihood, token_divergence, token_nll
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from ssm_mp.shards import shard_tokens, token_bytes
from tests.tiny import CONFIGS, HUGGING_FACE, LENGTH, MAMBA, VOCABULARY, random_model, random_tensors, some_windows

ADDS: list[Any] = [Likelihood, *([calls.LogSums] if calls.compiled() else [])]


@pytest.mark.parametrize("family", CONFIGS)
def test_perplexity_equals_the_plain_definition(family: str) -> None:
    model, windows = random_model(CONFIGS[family]), some_windows(7)
    total = 0.0
    with torch.inference_mode():
        for ids in windows.ids:
            logs = model(ids[None])[0].double().log_softmax(-1)
            total -= sum(float(logs[t, ids[t + 1]]) for t in range(LENGTH - 1))
    found = evaluate(model, windows)
    assert found.tokens == 7 * (LENGTH - 1)
    assert found.perplexity == pytest.approx(math.exp(total / found.tokens), rel=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_evaluation_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    # more windows than one thread takes at a time
    model, windows, before = random_model(MAMBA), some_windows(200), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = evaluate(model, windows).nll
        torch.set_num_threads(threads)
        assert np.array_equal(evaluate(model, windows).nll, expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocabulary", [3, 16, 1000, 8003])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_token_likelihoods_are_those_of_float64(vocabulary: int, spread: float) -> None:
    logits, targets = torch.randn(5, vocabulary) * spread, torch.randint(vocabulary, (5,))
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("width", [1, 7, 1500, 4000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_likelihoods_grow_by_blocks_of_columns(adds: Any, width: int, spread: float) -> None:
    logits, targets = torch.randn(5, 4000) * spread, torch.tensor([0, 6, 7, 1499, 3999])
    if width == 1:
        logits = logits[:, :4].contiguous()
        targets = targets % 4
    likelihood = adds(targets)
    for first in range(0, logits.shape[1], width):
        likelihood.add(logits[:, first : first + width], first)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(likelihood.nll(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 30, 34])
def test_a_block_that_is_not_finite_leaves_no_finite_likelihood(adds: Any, value: float, column: int) -> None:
    logits, likelihood = torch.zeros(2, 35), adds(torch.tensor([3, 3]))
    logits[1, column] = value
    for first in range(0, 35, 10):
        likelihood.add(logits[:, first : first + 10], first)
    assert torch.isfinite(likelihood.nll()).tolist() == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 20, 34])
def test_a_logit_that_is_not_finite_leaves_no_finite_likelihood(value: float, column: int) -> None:
    logits = torch.zeros(2, 35)
    logits[1, column] = value
    nll = token_nll(logits, torch.tensor([3, 3]))
    assert torch.isfinite(nll).tolist() == [True, False]


def test_evaluation_is_deterministic() -> None:
    model, windows = random_model(MAMBA), some_windows()
    assert np.array_equal(evaluate(model, windows).nll, evaluate(model, windows).nll)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefix_gives_exactly_the_whole_evaluation(family: str) -> None:
    model, windows = random_model(CONFIGS[family]), some_windows()
    whole = evaluate(model, windows).nll
    prefix = start(model, windows)
    for _ in model.layers:
        last = advance(model, prefix, len(model.layers) - prefix.layer)
        assert np.array_equal(finish(model, last, windows).nll, whole)
        prefix = advance(model, prefix)
    assert np.array_equal(finish(model, prefix, windows).nll, whole)


def test_divergence_is_that_of_the_two_distributions() -> None:
    a, b, windows = random_model(MAMBA, 0), random_model(MAMBA, 1), some_windows(3)
    ends = [advance(m, start(m, windows), len(m.layers)) for m in (a, b)]
    with torch.inference_mode():
        p, q = (m(windows.ids)[:, :-1].double().log_softmax(-1) for m in (a, b))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    evaluation, found = finish_against(a, ends[0], b, ends[1], windows)
    assert found == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(evaluation.nll, evaluate(b, windows).nll)
    assert finish_against(a, ends[0], a, ends[0], windows)[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("vocabulary", [3, 40, 8003])
@pytest.mark.parametrize("spread", [1e-2, 1.0, 20.0])
def test_token_divergences_are_those_of_float64(vocabulary: int, spread: float) -> None:
    logits, expected = torch.randn(4, vocabulary), torch.randn(4, vocabulary)
    kl = token_divergence(logits * spread, expected * spread)
    q, p = ((x * spread).double().log_softmax(-1) for x in (logits, expected))
    rounding = 1e-6 * max(1.0, spread)  # that of float32 logarithms, as large as the logits are
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_likelihood_that_is_not_finite_is_an_error(value: float) -> None:
    tensors = random_tensors(MAMBA)
    tensors["norm.bias"][0] = value
    with pytest.raises(EvaluationError, match="12 of 12 windows"):
        evaluate(build(MAMBA, tensors), some_windows(12))


def test_a_baseline_no_better_than_guessing_is_refused() -> None:
    random_text = Windows(torch.randint(0, VOCABULARY, (20, LENGTH), generator=torch.Generator().manual_seed(0)))
    baseline = evaluate(random_model(MAMBA), random_text)
    with pytest.raises(EvaluationError, match=f"no better than guessing uniformly among {VOCABULARY}"):
        require_better_than_guessing(baseline, VOCABULARY)
    require_better_than_guessing(evaluate(random_model(MAMBA), some_windows()), VOCABULARY)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    tensors = random_tensors(MAMBA) | {"norm.weight": torch.zeros(16), "norm.bias": torch.zeros(16)}
    assert evaluate(build(MAMBA, tensors), some_windows()).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_paired_increase_is_the_ratio_of_perplexities_with_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    reference = Evaluation(rng.normal(50, 9, size=40), 15)
    candidate = Evaluation(reference.nll + rng.normal(0.3, 0.1, size=40), 15)
    found = paired_increase(candidate, reference)
    assert found.percent == pytest.approx(100 * (candidate.perplexity / reference.perplexity - 1))
    differences = (candidate.nll - reference.nll) / 15
    assert found.log_stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(40))
    with pytest.raises(EvaluationError, match="not the same"):
        paired_increase(candidate, Evaluation(reference.nll[:30], 15))


def test_negative_log_likelihood_agrees_with_cross_entropy() -> None:
    model, windows = random_model(MAMBA), some_windows(2)
    with torch.inference_mode():
        logits = model(windows.ids)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="sum")
    assert evaluate(model, windows).nll.sum() == pytest.approx(float(expected), rel=1e-5)


def test_a_benchmark_counts_bytes_and_measures_both_sides() -> None:
    model = random_model(MAMBA)
    half = convert(model, PrecisionMap.uniform("fp16", find_components(model)), Scheme("none"))
    found = benchmark(half, model, some_windows(8), batches=(1, 8), pairs=2)
    assert found.fp32_bytes == 2 * found.stored_bytes
    assert found.resident_bytes == resident_bytes(half) == found.stored_bytes
    assert [p.batch for p in found.prefill] == [1, 8]
    assert all(p.tokens_per_second > 0 and p.fp32_tokens_per_second > 0 for p in found.prefill)
    assert found.to_json()["compression"] == 2


def test_a_benchmark_repeats_windows_where_a_batch_needs_more() -> None:
    model = random_model(MAMBA)
    assert [p.batch for p in benchmark(model, model, some_windows(3), batches=(8,), pairs=1).prefill] == [8]


def by_layers(model: LanguageModel, passed: list[nn.Module]) -> LanguageModel:
    """The same model, run layer by layer, noting what everything has passed."""
    modules = {component.name: model.component(component.name) for component in find_components(model)}
    return assemble(model.config, modules, after_layer=passed.append)


@pytest.mark.parametrize("family", CONFIGS)
def test_layer_by_layer_gives_the_very_same_numbers(family: str) -> None:
    model, windows, passed = random_model(CONFIGS[family]), some_windows(300), list[nn.Module]()
    layered = by_layers(model, passed)
    assert np.array_equal(evaluate(layered, windows).nll, evaluate(model, windows).nll)
    assert passed == [layered.embedding, *layered.layers, layered.embedding]
    first, ours = start(model, windows), start(layered, windows)
    final, found = advance(model, first, len(model.layers)), advance(layered, ours, len(model.layers))
    assert torch.equal(final.hidden, found.hidden)
    assert np.array_equal(finish(model, final, windows).nll, finish(layered, found, windows).nll)
    passed.clear()
    nll, kl = finish_against(layered, found, layered, found, windows)
    assert passed == [layered.embedding] * 2
    assert np.array_equal(nll.nll, finish(model, final, windows).nll)
    assert kl < 1e-6


@pytest.mark.parametrize("capacity", [0, 300 * LENGTH * 16 * 4, 1 << 30])
def test_layer_by_layer_shares_prefixes_as_window_by_window_does(capacity: int) -> None:
    model, windows = random_model(CONFIGS["itera"]), some_windows(300)
    components = find_components(model)
    layered = by_layers(model, [])
    cache = PrefixCache(capacity)
    for changed in ("lm_head", "layers.2.ssm.in_proj", "layers.1.ssm.out_proj"):
        one = (
            PrecisionMap.from_rules({"*": "fp16", changed: "int8"}, components)
            if changed in {c.name for c in components}
            else PrecisionMap.uniform("fp16", components)
        )
        converted = convert(layered, one, Scheme(activations="none"))
        held = one.to_json()
        before = [tuple(held[c.name] for c in components if c.stage <= i) for i in range(1, len(model.layers))]
        expected = evaluate(convert(model, one, Scheme(activations="none")), windows).nll
        assert np.array_equal(evaluate(converted, windows, None, Prefixes(cache, before)).nll, expected)
        assert cache.bytes <= capacity
    assert (cache.reuse.reused > 0) == (capacity > 0)


def test_a_wide_model_takes_fewer_tokens_at_a_time() -> None:
    wide = replace(HUGGING_FACE, d_inner=1 << 20)
    assert shard_tokens(HUGGING_FACE, 100) == 1024
    assert shard_tokens(wide, 100) * token_bytes(wide) <= 320 << 20
