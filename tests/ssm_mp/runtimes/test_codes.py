"""Codes are taken over as they are: what they stand for is what our own tensors are."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.codes import codes_of, joined, packed_rows
from ssm_mp.scheme import ScaleRule


def stored(precision: str, rows: int, width: int, seed: int = 0) -> Stored:
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return get_precision(precision).store(tensor, "weight", ScaleRule())


@pytest.mark.parametrize("width", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("precision", ["int8", "int6", "int5", "int4", "int3"])
def test_codes_stand_for_what_is_stored(precision: str, width: int) -> None:
    held = stored(precision, 7, width)
    codes = codes_of(held)
    assert codes is not None
    assert torch.equal(codes.tensor(), held.tensor())
    assert codes.group == (width if precision == "int8" else 64 if width % 64 == 0 else 32)


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
