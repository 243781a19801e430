from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions import quantize
from ssm_mp.precisions.quantize import (
    INT8_LIMIT,
    dequantize_rows,
    fits_product,
    histogram_scale,
    integer_product,
    integer_product_emulated,
    padded_product,
    padded_weight,
    quantize_rows,
    quantize_tensor,
    stored_scales,
    weight_scales,
)
from ssm_mp.scheme import ScaleMethod, ScaleRule

METHODS: tuple[ScaleMethod, ...] = ("minmax", "percentile", "mse")


def rows_of(seed: int, rows: int, width: int, spread: float) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def int8_pair(seed: int, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    return a, b


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 40), st.floats(1e-2, 1e3))
def test_minmax_error_is_at_most_half_a_step(seed: int, rows: int, width: int, spread: float) -> None:
    values = rows_of(seed, rows, width, spread)
    scales = weight_scales(values, ScaleRule("minmax"))
    restored = dequantize_rows(quantize_rows(values, scales), scales)
    assert bool(((restored - values).abs() <= 0.5001 * scales.float()[:, None]).all())


@given(st.integers(0, 999), st.sampled_from(METHODS))
def test_values_stay_symmetric_within_the_limit(seed: int, method: ScaleMethod) -> None:
    values = rows_of(seed, 4, 300, 1.0)
    quantized = quantize_rows(values, weight_scales(values, ScaleRule(method, 90)))
    assert int(quantized.min()) >= -INT8_LIMIT
    assert int(quantized.max()) <= INT8_LIMIT
    assert torch.equal(quantize_rows(-values, weight_scales(-values, ScaleRule(method, 90))), -quantized)


def test_mse_is_never_worse_than_minmax_in_square_error() -> None:
    values, limit = rows_of(0, 16, 400, 1.0), 7  # few steps, where clipping pays
    errors = {}
    for method in ("minmax", "mse"):
        scales = weight_scales(values, ScaleRule(method), limit)
        restored = dequantize_rows(quantize_rows(values, scales, limit), scales)
        errors[method] = (restored - values).square().sum(dim=1)
    assert bool((errors["mse"] <= errors["minmax"]).all())
    assert float(errors["mse"].sum()) < 0.9 * float(errors["minmax"].sum())


def test_percentile_clips_what_lies_beyond_it() -> None:
    values = torch.cat([torch.full((1, 99), 1.0), torch.tensor([[100.0]])], dim=1)
    assert float(weight_scales(values, ScaleRule("percentile", 99))) == pytest.approx(1 / INT8_LIMIT, rel=1e-3)
    assert float(weight_scales(values, ScaleRule("percentile", 100))) == pytest.approx(100 / INT8_LIMIT, rel=1e-3)


@given(st.lists(st.floats(1e-6, 6e4), min_size=1, max_size=20))
def test_stored_scales_are_the_smallest_float16_not_below(scales: list[float]) -> None:
    wanted = torch.tensor(scales, dtype=torch.float32)
    stored = stored_scales(wanted)
    assert stored.dtype == torch.float16
    below = (stored.view(torch.int16) - 1).view(torch.float16).float()
    assert bool((stored.float() >= wanted).all())
    assert bool((below < wanted).all())


def test_a_row_of_zeros_stays_zero() -> None:
    for method in METHODS:
        values = torch.zeros(2, 5)
        scales = weight_scales(values, ScaleRule(method))
        assert torch.equal(dequantize_rows(quantize_rows(values, scales), scales), values)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_above_float16_is_infeasible(method: ScaleMethod) -> None:
    with pytest.raises(InfeasibleError, match="above float16's largest value"):
        weight_scales(torch.full((1, 3), 1e9), ScaleRule(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1e-9, 4e-8, 1e-20, 1e-38, 1e-45])
def test_a_row_below_float16_is_the_nearest_that_can_be_stored_and_no_other_row_changes(
    method: ScaleMethod, value: float
) -> None:
    values = rows_of(3, 4, 50, 1.0)
    alone = weight_scales(values, ScaleRule(method))
    values[2] = torch.linspace(-value, value, 50)
    scales = weight_scales(values, ScaleRule(method))
    restored = dequantize_rows(quantize_rows(values, scales), scales)
    assert torch.equal(restored[2], (values[2] / 2.0**-24).round() * 2.0**-24)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(scales[others], alone[others])


@given(st.lists(st.floats(-44, 6), min_size=1, max_size=8), st.sampled_from(METHODS), st.integers(0, 99))
def test_rows_of_any_magnitude_are_held_no_worse_than_as_zeros(
    exponents: list[float], method: ScaleMethod, seed: int
) -> None:
    values = rows_of(seed, len(exponents), 70, 0.2) * torch.tensor([[10.0**e] for e in exponents], dtype=torch.float64)
    values = values.float()
    scales = weight_scales(values, ScaleRule(method))
    restored = dequantize_rows(quantize_rows(values, scales), scales).double()
    errors, zeros = (restored - values.double()).square().sum(dim=1), values.double().square().sum(dim=1)
    assert bool((errors <= zeros * (1 + 1e-6)).all())
    assert errors.sum() <= zeros.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("largest", [1e-6, 1e-9, 1e-30])
def test_inputs_below_float16_have_its_smallest_scale(method: ScaleMethod, largest: float) -> None:
    counts = torch.ones(100, dtype=torch.float64)
    assert float(histogram_scale(counts, largest, ScaleRule(method))) == 2.0**-24


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 2500), st.integers(1, 20))
def test_emulated_product_equals_the_integer_product(seed: int, m: int, k: int, n: int) -> None:
    a, b = int8_pair(seed, m, k, n)
    exact = a.long() @ b.long().t()
    assert torch.equal(integer_product(a, b).long(), exact)
    assert torch.equal(integer_product_emulated(a, b).long(), exact)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "emulated": integer_product_emulated,
    "native": integer_product,  # torch's own, where this CPU's is exact
}


@pytest.mark.parametrize("product", PRODUCTS)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_padded_product_is_the_integer_product_and_asks_only_for_sizes_that_cuda_takes(
    product: str, seed: int, m: int, k: int, n: int, padded_before: bool
) -> None:
    a, b = int8_pair(seed, m, k, n)

    def picky(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] == b.shape[1]
        assert a.shape[1] % 8 == b.shape[0] % 8 == 0
        return PRODUCTS[product](a, b)

    found = padded_product(a, padded_weight(b) if padded_before else b, picky)
    assert torch.equal(found[:, :n].long(), a.long() @ b.long().t())
    assert padded_before or found.shape == (m, n)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_padded_weight_is_the_smallest_that_fits(n: int, k: int) -> None:
    b = int8_pair(0, 1, k, n)[1]
    padded = padded_weight(b)
    assert fits_product(padded.shape)
    assert torch.equal(padded[:n, :k], b)
    assert int(padded.count_nonzero()) == int(b.count_nonzero())
    assert max(padded.shape[0] - n, padded.shape[1] - k) < 8
    assert fits_product(b.shape) == (padded is b)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["AVX2", "SSE41"])
def test_the_product_is_exact_without_vnni(instructions: str) -> None:
    """In a process of its own, where oneDNN may not use the instructions that make its product exact."""
    program = (
        "import torch; from ssm_mp.precisions.quantize import integer_product;"
        "a = torch.full((40, 300), 127, dtype=torch.int8);"
        "assert torch.equal(integer_product(a, a), torch.full((40, 40), 127 * 127 * 300, dtype=torch.int32))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("native", "emulated"), [(1.0, 2.0), (2.0, 1.0)])
def test_torchs_product_serves_where_it_is_exact_and_the_faster_one(
    exact: bool, native: float, emulated: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {quantize._native_product: native, integer_product_emulated: emulated}
    monkeypatch.setattr(quantize, "_native_product_is_exact", lambda: exact)
    monkeypatch.setattr(quantize, "_seconds", lambda product, a: seconds[product])
    assert quantize._native_product_serves.__wrapped__() == (exact and native < emulated)


def test_emulated_product_is_exact_at_the_extremes() -> None:
    a = torch.full((3, 5000), 127, dtype=torch.int8)
    assert torch.equal(integer_product_emulated(a, a), torch.full((3, 3), 127 * 127 * 5000, dtype=torch.int32))


def test_histogram_scales_agree_with_the_values_behind_them() -> None:
    values = rows_of(1, 1, 200_000, 1.0).abs().flatten()
    largest = values.max().item()
    counts = torch.histc(values, bins=2048, min=0.0, max=largest).double()
    assert float(histogram_scale(counts, largest, ScaleRule("minmax"))) * 127 == pytest.approx(largest, rel=1e-3)
    percentile = float(torch.quantile(values.double()[:100_000], 0.999))
    found = float(histogram_scale(counts, largest, ScaleRule("percentile", 99.9))) * 127
    assert found == pytest.approx(percentile, rel=0.03)


def test_mse_histogram_scale_has_less_error_than_minmax() -> None:
    values = (rows_of(2, 1, 100_000, 1.0) ** 3).abs().flatten()
    largest = values.max().item()
    counts = torch.histc(values, bins=2048, min=0.0, max=largest).double()

    def error(method: ScaleMethod) -> float:
        scale = histogram_scale(counts, largest, ScaleRule(method)).float()
        return float((quantize_tensor(values, scale).float() * scale - values).square().mean())

    assert error("mse") < error("minmax")
