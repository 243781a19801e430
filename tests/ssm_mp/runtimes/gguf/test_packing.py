"""Codes of ours as GGUF's tensor types hold them, against GGUF's own reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from ssm_mp.errors import ExportError
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.runtimes.gguf.packing import Packed, packed, row_bytes, word_of
from ssm_mp.scheme import ScaleRule

INTEGERS = ("int8", "int6", "int5", "int4", "int3", "int4g32", "int3g128")
SHAPES = ((3, 32), (5, 96), (4, 160), (1, 64))
"""Rows that groups of 64 cut, and rows that they do not."""


def stored(precision: str, shape: tuple[int, int], seed: int = 0) -> Stored:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[0, :32] = 0
    return get_precision(precision).store(values, "weight", ScaleRule("mse"))


def read(part: Packed) -> np.ndarray:
    """What the reader makes of the bytes."""
    found: np.ndarray = gguf.dequantize(part.bytes(), gguf.GGMLQuantizationType[part.word])
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("precision", "word"),
    [
        ("int8", "Q8_0"),
        ("int6", "Q8_0"),
        ("int5", "Q5_0"),
        ("int4", "Q4_0"),
        ("int3", "Q4_0"),
        ("int4g32", "Q4_0"),
        ("int4g128", "Q4_0"),
        ("int3g32", "Q4_0"),
        ("int3g128", "Q4_0"),
    ],
)
def test_codes_are_read_as_the_values_that_they_stood_for(precision: str, word: str, shape: tuple[int, int]) -> None:
    held = stored(precision, shape)

    found = packed(held)

    assert found.word == word == word_of(held)
    assert np.array_equal(read(found), held.tensor().numpy())
    assert np.array_equal(found.floats(), held.tensor().numpy())
    assert found.bytes().shape == (shape[0], row_bytes(word, shape[1]))


@pytest.mark.parametrize("precision", INTEGERS)
def test_rows_taken_in_another_order_are_the_same_rows(precision: str) -> None:
    held = stored(precision, (5, 96))
    order = np.array([4, 0, 0, 2])

    assert np.array_equal(read(packed(held).taken(order)), held.tensor().numpy()[order])


@pytest.mark.parametrize("precision", INTEGERS)
def test_a_multiple_keeps_the_codes(precision: str) -> None:
    held = packed(stored(precision, (5, 96)))

    found = held.multiplied(0.7)

    assert np.array_equal(found.values, held.values)
    assert np.array_equal(read(found), found.floats())
    assert np.allclose(found.floats(), held.floats() * np.float32(0.7), rtol=2**-11, atol=0)
    assert np.array_equal(read(held.multiplied(0.5)), held.floats() * 0.5)  # of a power of two nothing is rounded


def test_five_bits_are_the_bytes_of_ggufs_own_quantiser() -> None:
    values = torch.randint(-15, 16, (6, 64), generator=torch.Generator().manual_seed(0)).float()
    values[:, ::32] = -16.0  # what its scale is taken from, a sixteenth
    scaled = (values * 0.25).numpy()
    held = Packed("Q5_0", values.numpy().astype(np.int8).reshape(6, 2, 32), np.full((6, 2), 0.25, np.float16))

    assert np.array_equal(held.bytes(), gguf.quantize(scaled, gguf.GGMLQuantizationType.Q5_0))


def test_floats_stay_as_they_are() -> None:
    half, whole = torch.randn(3, 20).half(), torch.randn(3, 20)

    assert np.array_equal(packed(FloatTensor(half)).floats(), half.float().numpy())
    assert np.array_equal(packed(FloatTensor(whole)).bytes().view(np.float32), whole.numpy())


@pytest.mark.parametrize(
    ("precision", "shape"),
    [("int8", (3, 48)), ("int5", (3, 48)), ("int4", (3, 33)), ("nf4", (3, 64)), ("nf3g32", (3, 64))],
)
def test_what_no_type_holds_is_refused(precision: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match="GGUF has no type"):
        packed(stored(precision, shape))


def test_a_multiple_beyond_float16_is_refused() -> None:
    with pytest.raises(ExportError, match="times 1e\\+06"):
        packed(FloatTensor(torch.ones(2, 32).half())).multiplied(1e6)
