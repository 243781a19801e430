"""Calibration in one pass finds what two passes find, in whatever order, by whatever threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import (
    InputStatistics,
    _Magnitudes,
    calibrate,
    calibrate_reference,
    count_magnitudes_reference,
)
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.errors import EvaluationError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.kernels import calls
from ssm_mp.model import assemble
from ssm_mp.modules.linear import Multiplier
from ssm_mp.precisions.quantize import histogram_scale
from ssm_mp.scheme import ScaleRule
from tests.families.models import fp32_of, windows_of
from tests.tiny import MAMBA, MAMBAS, random_model, some_windows

COMPONENT = next(c for c in find_components(random_model(MAMBA)) if c.multiplies_inputs)
FAMILIES = ("itera", "lfm2_moe/plain", "lfm2_moe/plain-together", "bamba/plain")


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def require_alike(found: dict[str, InputStatistics], expected: dict[str, InputStatistics]) -> None:
    """The same components, tokens, ranges; and as many inputs below any magnitude, give or take a bin."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert one.tokens == other.tokens
        assert one.largest == pytest.approx(other.largest, rel=1e-5)
        assert float(one.counts.sum()) == float(other.counts.sum())
        below, expected_below = one.counts.cumsum(0), other.counts.cumsum(0)
        assert bool((expected_below[:-2] <= below[1:-1] + 1e-6).all())
        assert bool((below[1:-1] <= expected_below[2:] + 1e-6).all())
        assert float((one.counts - other.counts).abs().sum()) <= 0.2 * float(other.counts.sum())
        if sum(one.tokens):
            assert float(one.scale(ScaleRule())) == pytest.approx(float(other.scale(ScaleRule())), rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_finds_what_two_find(name: str) -> None:
    model, windows = fp32_of(name), windows_of(name, 24)
    require_alike(calibrate(model, windows), calibrate_reference(model, windows))


@pytest.mark.parametrize("name", MAMBAS)
def test_heads_of_their_own_and_of_the_embedding_are_watched(name: str) -> None:
    model = random_model(MAMBAS[name])
    found = calibrate(model, some_windows())
    require_alike(found, calibrate_reference(model, some_windows()))
    assert ("embedding" in found, "lm_head" in found) == (MAMBAS[name].tied, not MAMBAS[name].tied)


def test_every_block_of_an_embedding_sees_what_the_head_multiplies() -> None:
    model = split_embedding(random_model(MAMBA), torch.arange(MAMBA.vocabulary), [10, 30])
    found = calibrate(model, some_windows())
    require_alike(found, calibrate_reference(model, some_windows()))
    assert sum(name.startswith("embedding.blocks.") for name in found) == 3


def test_scales_are_those_of_two_passes() -> None:
    model, windows = random_model(MAMBA), some_windows(64)
    found, expected = calibrate(model, windows), calibrate_reference(model, windows)
    for name, one in found.items():
        other = expected[name]
        step = other.largest / 2048 / 127  # a percentile is known to a bin
        for percentile in (99.9, 99.99):
            rule = ScaleRule("percentile", percentile)
            assert float(one.scale(rule)) == pytest.approx(float(other.scale(rule)), rel=1e-3, abs=1.01 * step)
        error = [_square_error(other, float(each.scale(ScaleRule("mse")))) for each in (one, other)]
        assert error[0] <= error[1] * (1 + 1e-3)


def _square_error(statistics: InputStatistics, scale: float) -> float:
    """Of the inputs that a histogram counts, at a scale."""
    centres = (torch.arange(2048, dtype=torch.float64) + 0.5) * statistics.largest / 2048
    restored = (centres / scale).round().clamp(max=127) * scale
    return float((restored - centres).square() @ statistics.counts)


def test_no_logit_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = random_model(MAMBA), some_windows()
    expected = calibrate(model, windows)
    head = model.component("embedding")
    multiply: Callable[[Multiplier, Tensor], Tensor] = Multiplier.multiply

    def counted(self: Multiplier, x: Tensor) -> Tensor:
        assert self is not head
        return multiply(self, x)

    monkeypatch.setattr(Multiplier, "multiply", counted)
    require_alike(calibrate(model, windows), expected)


@pytest.mark.parametrize("name", ["itera", "lfm2_moe/plain-together"])
@pytest.mark.parametrize("count", [1, 2])
def test_layer_by_layer_and_in_threads_the_numbers_are_the_same(name: str, count: int) -> None:
    model, windows = fp32_of(name), windows_of(name, 200)
    expected = calibrate(model, windows)
    passed: list[nn.Module] = []
    modules = {c.name: model.component(c.name) for c in find_components(model)}
    large = assemble(model.config, modules, after_layer=passed.append)
    told: list[str] = []

    def steps(what: str, total: int) -> Callable[[], None]:
        told.append(f"{what} {total}")
        return lambda: told.append(".")

    with threads(count):
        found = calibrate(large, windows, steps)
    for key, one in found.items():
        assert torch.equal(one.counts, expected[key].counts)
        assert (one.largest, one.tokens) == (expected[key].largest, expected[key].tokens)
    assert len(passed) == 1 + len(model.layers)
    assert passed[0] is large.embedding
    assert int(told[0].removeprefix("calibrating ")) == len(told) - 1
    evaluate(large, windows)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), min_size=1, max_size=8),
    st.integers(-25, 5),
)  # fmt: skip
def test_magnitudes_are_counted_in_any_order(batches: list[list[float]], power: int) -> None:
    inputs = [torch.tensor([batch]) * 10.0**power for batch in batches]
    found = []
    for arranged in (inputs, inputs[::-1], [torch.cat(inputs, dim=1)]):
        magnitudes = _Magnitudes(COMPONENT)
        for x in arranged:
            magnitudes.see(x)
        found.append(magnitudes.statistics())
    values = torch.cat([x.flatten() for x in inputs]).abs().double()
    for one in found:
        assert one.largest == float(values.max())
        assert torch.equal(one.counts, found[0].counts)
        assert float(one.counts.sum()) == pytest.approx(values.numel())
        assert bool((one.counts >= 0).all())
        if one.largest < 2.0**-40:
            continue
        below = one.counts.cumsum(0)
        for b in (1, 100, 1024, 2000):
            edge, fine = one.largest * b / 2048, one.largest * 2 / (1 << 15)
            least, most = (int((values < edge + off).sum()) for off in (-fine, fine))
            assert least - 1e-6 <= float(below[b - 1]) <= most + 1e-6


@given(st.integers(1, 9), st.integers(1, 70), st.booleans(), st.integers(0, 99), st.sampled_from([1, 7, 4096]))
def test_the_kernel_counts_as_the_reference(m: int, k: int, strided: bool, seed: int, bins: int) -> None:
    x = torch.randn(m, k + 3, generator=torch.Generator().manual_seed(seed))[:, : k if strided else k + 3]
    counts = torch.full((bins,), 5)
    calls.count_magnitudes(x, bins / 2, counts)
    assert torch.equal(counts - 5, count_magnitudes_reference(x, bins / 2, bins))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_named(value: float) -> None:
    x = torch.zeros(2, 5)
    x[1, 3] = value
    with pytest.raises(EvaluationError, match=f"an input of {COMPONENT.name} is .*(inf|nan)"):
        _Magnitudes(COMPONENT).see(x)


def test_many_threads_lose_no_input() -> None:
    magnitudes = _Magnitudes(COMPONENT)
    x = torch.rand(50, 40)
    workers = [threading.Thread(target=lambda: [magnitudes.see(x) for _ in range(50)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert magnitudes.statistics().tokens == (50 * 4 * 50,)
    assert float(magnitudes.statistics().counts.sum()) == 50 * 4 * x.numel()


def test_inputs_of_zeros_have_a_range_of_zero_and_a_scale() -> None:
    magnitudes = _Magnitudes(COMPONENT)
    magnitudes.see(torch.zeros(3, 4))
    found = magnitudes.statistics()
    assert (found.largest, float(found.counts.sum()), found.tokens) == (0.0, 12.0, (3,))
    assert float(found.scale(ScaleRule())) == float(histogram_scale(found.counts, 0.0, ScaleRule()))


def test_values_at_the_end_of_the_range_are_counted() -> None:
    magnitudes = _Magnitudes(COMPONENT)
    magnitudes.see(torch.tensor([[4.0, 4.0, 1.0, 0.0]]))
    counts = magnitudes.statistics().counts.numpy()
    assert np.flatnonzero(counts > 0.01).tolist()[-1] == 2047
    assert counts[2047] == pytest.approx(2)
