"""The benchmark of products multiplies what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.products import FP32, PRECISE, TORCH, measure, random_stored, ways_of


@pytest.mark.parametrize("precision", PRECISE)
def test_random_weights_are_of_the_shape_and_not_alike(precision: str) -> None:
    stored = random_stored(precision, 6, 128, torch.Generator().manual_seed(0))
    assert stored.tensor().shape == (6, 128)
    assert stored.tensor().unique().numel() > 3


def test_every_way_gives_a_product_of_its_weight() -> None:
    ways = ways_of(6, 128, 1, PRECISE)
    assert set(ways) == {TORCH, FP32, *PRECISE}
    found = {name: way() for name, way in ways.items()}
    assert all(isinstance(value, torch.Tensor) and value.shape == (1, 6) for value in found.values())
    torch.testing.assert_close(found[FP32], found[TORCH])


def test_speedups_are_over_both_fp32_products() -> None:
    row = measure(6, 128, 1, ("nf4",), 1)
    assert row[TORCH]["over_torch"] == row[FP32]["over_fp32"] == 1.0
    assert row["nf4"]["microseconds"] > 0
