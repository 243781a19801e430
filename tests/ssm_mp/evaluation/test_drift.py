"""Increase by position: nothing where there is nothing, everything counted once, and growth is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.data import Windows
from ssm_mp.errors import DataError, EvaluationError
from ssm_mp.evaluation.drift import LONG, Losses, drift, drift_of, token_losses, too_long
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, HUGGING_FACE, LENGTH, random_model, random_tensors, repetitive_tokens, some_windows


def lowered(model: LanguageModel, precision: str = "int3") -> LanguageModel:
    return convert(model, PrecisionMap.uniform(precision, find_components(model)), Scheme("none"))


def random_losses(windows: int, predicted: int, seed: int = 0) -> tuple[Losses, Losses]:
    rng = np.random.default_rng(seed)
    fp32 = rng.normal(3, 1, size=(windows, predicted))
    return fp32 + rng.normal(0.01, 0.05, size=fp32.shape), fp32


def long_windows(count: int, length: int) -> Windows:
    return Windows(torch.from_numpy(repetitive_tokens(count * length).reshape(count, length)))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_against_itself_drifts_nowhere_at_all(family: str) -> None:
    model = random_model(CONFIGS[family])
    found = drift(model, model, some_windows(70))
    increases = [found.whole, found.growth, *(bucket.increase for bucket in found.buckets)]
    assert {(i.log_mean, i.log_stderr, i.percent) for i in increases} == {(0.0, 0.0, 0.0)}
    assert not found.grows


@pytest.mark.parametrize("family", CONFIGS)
def test_all_positions_together_are_the_evaluation(family: str) -> None:
    model, windows = random_model(CONFIGS[family]), some_windows(70)
    small = lowered(model)
    whole = drift(small, model, windows, buckets=1)
    expected = paired_increase(evaluate(small, windows), evaluate(model, windows))
    assert whole.whole.log_mean == pytest.approx(expected.log_mean, rel=1e-9)
    assert whole.whole.log_stderr == pytest.approx(expected.log_stderr, rel=1e-9)
    assert whole.fp32.perplexity == pytest.approx(evaluate(model, windows).perplexity, rel=1e-12)
    assert whole.buckets[0].increase.log_mean == pytest.approx(whole.whole.log_mean, rel=1e-12)
    assert (whole.length, whole.buckets[0].first, whole.buckets[0].last) == (LENGTH, 1, LENGTH - 1)


def test_losses_of_tokens_are_those_of_the_plain_definition() -> None:
    model, windows = random_model(CONFIGS["itera"]), some_windows(5)
    with torch.inference_mode():
        logs = model(windows.ids).double().log_softmax(-1)[:, :-1]
    expected = -logs.gather(-1, windows.ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(token_losses(model, windows), expected.numpy(), rtol=1e-5, atol=1e-6)


@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_buckets_cover_every_position_once_and_their_mean_is_the_whole_increase(
    windows: int, predicted: int, buckets: int, seed: int
) -> None:
    found = drift_of(*random_losses(windows, predicted, seed), buckets)
    covered = [at for bucket in found.buckets for at in range(bucket.first, bucket.last + 1)]
    assert covered == list(range(1, predicted + 1))
    assert len(found.buckets) == min(buckets, predicted)
    sizes = np.array([bucket.last - bucket.first + 1 for bucket in found.buckets])
    assert sizes.max() - sizes.min() <= 1
    mean = np.average([bucket.increase.log_mean for bucket in found.buckets], weights=sizes)
    assert mean == pytest.approx(found.whole.log_mean, rel=1e-9, abs=1e-12)
    perplexities = [math.log(bucket.fp32_perplexity) for bucket in found.buckets]
    assert np.average(perplexities, weights=sizes) == pytest.approx(math.log(found.fp32.perplexity))


def test_an_error_that_grows_is_shown_with_its_size() -> None:
    ours, theirs = random_losses(200, 64)
    found = drift_of(ours + np.linspace(0, 0.2, 64), theirs, 8)
    assert found.grows
    assert found.growth.log_mean == pytest.approx(0.2, abs=4 * found.growth.log_stderr)
    percents = [bucket.increase.percent for bucket in found.buckets]
    assert percents == sorted(percents)
    assert percents[-1] - percents[0] == pytest.approx(100 * math.expm1(0.2 * 56 / 63), abs=3)


@pytest.mark.parametrize("slope", [0.0, -0.2])
def test_an_error_that_does_not_grow_is_none_that_grows(slope: float) -> None:
    ours, theirs = random_losses(200, 64, seed=3)
    assert not drift_of(ours + np.linspace(0, slope, 64), theirs, 8).grows


def test_the_standard_error_of_the_growth_is_what_growth_scatters_by() -> None:
    grown = [drift_of(*random_losses(20, 16, seed), 4).growth for seed in range(300)]
    scattered = float(np.std([growth.log_mean for growth in grown]))
    assert np.mean([growth.log_stderr for growth in grown]) == pytest.approx(scattered, rel=0.15)


class Erring(nn.Module):
    """A layer whose output is off by an error that grows with the position, or stays as large as it is on average."""

    def __init__(self, layer: nn.Module, size: float, grows: bool) -> None:
        super().__init__()
        self.layer, self.size, self.grows = layer, size, grows

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        length = x.shape[1]
        share = torch.arange(length) / (length - 1) if self.grows else torch.full((length,), 0.5)
        direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
        return out + self.size * share[:, None] * direction


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("grows", [True, False])
def test_a_model_whose_error_grows_with_the_position_is_told_from_one_whose_error_stays(
    family: str, grows: bool
) -> None:
    model, erring = random_model(CONFIGS[family]), random_model(CONFIGS[family])
    erring.layers[-1] = Erring(erring.layers[-1], 2.0, grows)
    found = drift(erring, model, some_windows(300), buckets=3)
    assert found.whole.percent > 4 * found.whole.stderr_percent
    assert found.grows is grows
    if grows:
        first, _, last = (bucket.increase for bucket in found.buckets)
        assert last.percent > 2 * first.percent


@pytest.mark.parametrize("family", ["mamba", "itera"])
def test_long_windows_are_refused_where_positions_end(family: str) -> None:
    model = random_model(CONFIGS[family])
    said = f"positions end at {LENGTH} tokens, so it cannot read windows of {LONG * LENGTH}"
    assert said in (too_long(model.config, LONG * LENGTH) or "")
    with pytest.raises(DataError, match=said):
        drift(model, model, long_windows(3, LONG * LENGTH))


def test_long_windows_are_read_where_there_are_no_positions() -> None:
    model = random_model(HUGGING_FACE)
    assert too_long(model.config, 10**9) is None
    found = drift(lowered(model), model, long_windows(3, LONG * LENGTH))
    assert (found.length, found.buckets[-1].last) == (LONG * LENGTH, LONG * LENGTH - 1)


def test_too_little_to_compare_is_one_clear_error() -> None:
    model = random_model(HUGGING_FACE)
    for windows, buckets in ((some_windows(1), 8), (some_windows(4), 0)):
        with pytest.raises(DataError, match="expected at least two windows"):
            drift(model, model, windows, buckets)


def test_a_likelihood_that_is_not_finite_says_where() -> None:
    broken = random_tensors(HUGGING_FACE)
    broken["embedding.weight"][7, 0] = math.inf
    ids = torch.zeros(3, LENGTH, dtype=torch.long)
    ids[1, 4] = 7
    with pytest.raises(EvaluationError, match="negative log-likelihood is nan"):
        token_losses(build(HUGGING_FACE, broken), Windows(ids))


def test_the_answer_in_json_is_in_percent() -> None:
    found = drift_of(*random_losses(9, 16), 4)
    told = found.to_json()
    assert told["increase_percent"] == found.whole.percent
    assert told["growth_stderr_percent"] == found.growth.stderr_percent
    assert (told["length"], told["windows"], len(told["buckets"])) == (17, 9, 4)
    assert told["buckets"][0].keys() == {"first", "last", "fp32_perplexity", "increase_percent", "stderr_percent"}
