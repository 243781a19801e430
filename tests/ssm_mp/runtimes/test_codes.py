"""Codes are taken over as they are: what they stand for is what our own tensors are."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.codes import codes_of, integers_of, joined, packed_rows
from ssm_mp.scheme import ScaleRule


def stored(precision: str, rows: int, width: int, seed: int = 0) -> Stored:
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return get_precision(precision).store(tensor, "weight", ScaleRule("mse"))


@pytest.mark.parametrize("width", [32, 64, 96, 128, 160])
@pytest.mark.parametrize(
    "precision", ["int8", "int6", "int5", "int4", "int3", "int4g32", "int4g128", "int3g32", "int3g128"]
)
def test_codes_stand_for_what_is_stored(precision: str, width: int) -> None:
    held, integers = stored(precision, 7, width), integers_of(precision)
    codes = codes_of(held)
    assert codes is not None
    assert integers is not None
    assert torch.equal(codes.tensor(), held.tensor())
    assert codes.group == integers.group_of(width)
    assert (codes.bits, codes.zero) == (integers.bits, 1 << integers.bits - 1)


@pytest.mark.parametrize(
    ("precision", "width", "group"),
    [("int8", 96, 96), ("int4", 96, 32), ("int4", 128, 64), ("int4g32", 128, 32), ("int4g128", 128, 128),
     ("int4g128", 192, 64), ("int3g128", 160, 32), ("int4", 48, None), ("int3g32", 16, None)],
)  # fmt: skip
def test_rows_are_cut_into_the_largest_groups_that_lie_in_ours(precision: str, width: int, group: int | None) -> None:
    integers = integers_of(precision)
    assert integers is not None
    assert integers.group_of(width) == group


@pytest.mark.parametrize("precision", ["nf4", "nf3g32", "nf2", "fp16", "fp32", "fp8"])
def test_what_is_no_integer_has_none(precision: str) -> None:
    assert integers_of(precision) is None


def test_levels_of_int3_are_counted_from_minus_four_and_scales_keep_their_sign() -> None:
    held = stored("int3", 8, 64)
    codes = codes_of(held)
    assert codes is not None
    assert codes.values().min() == -4
    assert bool((codes.scale < 0).any())
    assert torch.equal(codes.scale.flatten(), held.arrays()["scale"])


def test_rows_of_other_widths_and_other_books_are_no_codes() -> None:
    assert codes_of(stored("int4", 8, 40)) is None
    assert codes_of(stored("int3", 4, 16)) is None
    assert codes_of(stored("nf4", 8, 64)) is None
    assert codes_of(stored("fp16", 8, 64)) is None
    assert codes_of(stored("int8", 8, 40)) is not None
    assert codes_of(get_precision("int8").store(torch.randn(64), "vector", ScaleRule())) is None


@pytest.mark.parametrize("precision", ["int8", "int6", "int5", "int4", "int3"])
def test_parts_stand_one_below_the_other_and_rows_can_be_taken(precision: str) -> None:
    parts = [stored(precision, rows, 96, seed) for seed, rows in enumerate((3, 5))]
    whole = joined([codes for part in parts if (codes := codes_of(part)) is not None])
    expected = torch.cat([part.tensor() for part in parts])
    assert torch.equal(whole.tensor(), expected)
    assert torch.equal(whole.rows(lambda rows: rows.unflatten(0, (2, 4))).tensor(), expected.unflatten(0, (2, 4)))
    assert torch.equal(whole.rows(lambda rows: rows[4:]).tensor(), expected[4:])


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_packed_rows_are_a_stream_of_bits_from_the_lowest(bits: int) -> None:
    codes = torch.randint(1 << bits, (5, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for row, packed in zip(codes.tolist(), packed_rows(codes, bits).tolist(), strict=True):
        stream = sum(code << bits * i for i, code in enumerate(row))
        assert bytes(packed) == stream.to_bytes(32 * bits // 8, "little")
