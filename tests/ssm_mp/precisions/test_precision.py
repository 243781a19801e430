"""A contract that every precision keeps, and what is particular to each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.errors import InfeasibleError, PrecisionMapError
from ssm_mp.precisions.precision import FP16, INT8, PRECISIONS, Precision, get_precision
from ssm_mp.precisions.stored import ArraySpec, Role
from ssm_mp.scheme import PRECISION_NAMES, ScaleRule

shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 9), st.just(1), st.integers(1, 5))
)
precisions = st.sampled_from(list(PRECISIONS.values()))
WEIGHT: Role = "weight"
ERRORS = {"fp16": 0.001, "int8": 0.005, "nf4": 0.16, "int4": 0.08, "int3": 0.17}
"""Largest error of a value, as a share of the largest in its group."""


def test_precisions_are_those_that_a_study_can_name_in_the_same_order() -> None:
    assert tuple(PRECISIONS) == PRECISION_NAMES


@given(precisions, shapes, st.integers(0, 99))
def test_stored_arrays_are_what_arrays_says(precision: Precision, shape: tuple[int, ...], seed: int) -> None:
    stored = precision.store(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), WEIGHT, ScaleRule())
    found = {suffix: ArraySpec(tuple(a.shape), a.dtype) for suffix, a in stored.arrays().items()}
    assert found == precision.arrays(shape, WEIGHT)
    assert sum(a.numel() * a.element_size() for a in stored.arrays().values()) == precision.bytes(shape, WEIGHT)


@given(precisions, shapes)
def test_restored_arrays_give_the_same_tensor(precision: Precision, shape: tuple[int, ...]) -> None:
    stored = precision.store(torch.randn(shape), WEIGHT, ScaleRule("mse"))
    assert torch.equal(precision.restore(stored.arrays(), shape, WEIGHT).tensor(), stored.tensor())


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("role", ["weight", "vector", "bias"])
def test_values_come_back_close_in_every_role(precision: Precision, role: Role) -> None:
    tensor = torch.randn(12) if role != "weight" else torch.randn(12, 7)
    stored = precision.store(tensor, role, ScaleRule())
    assert stored.tensor().dtype == torch.float32
    assert float((stored.tensor() - tensor).abs().max()) <= ERRORS[precision.name] * float(tensor.abs().max())
    assert torch.equal(precision.restore(stored.arrays(), tuple(tensor.shape), role).tensor(), stored.tensor())


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_rows_equal_rows_of_the_whole(precision: Precision) -> None:
    stored = precision.store(torch.randn(30, 8), WEIGHT, ScaleRule())
    index = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(stored.rows(index), stored.tensor()[index])


@given(precisions, st.lists(st.floats(-44, 4), min_size=1, max_size=6), st.sampled_from(["weight", "vector"]))
def test_values_of_any_magnitude_are_held_no_worse_than_as_zeros(
    precision: Precision, exponents: list[float], role: Role
) -> None:
    rows = torch.tensor([[10.0**e] for e in exponents], dtype=torch.float64)
    tensor = (torch.randn(len(exponents), 64, dtype=torch.float64) * rows).float()
    tensor = tensor.flatten() if role == "vector" else tensor
    held = precision.store(tensor, role, ScaleRule("mse")).tensor().double()
    error, zeros = ((held - tensor.double()).square().sum(), tensor.double().square().sum())
    assert error <= zeros * (1 + 1e-6)


def test_fp16_is_exactly_half() -> None:
    tensor = torch.randn(9, 9)
    assert torch.equal(FP16.store(tensor, WEIGHT, ScaleRule()).arrays()[""], tensor.half())


def test_fp16_overflow_is_infeasible_and_says_the_value() -> None:
    with pytest.raises(InfeasibleError, match="7e\\+04"):
        FP16.store(torch.tensor([1.0, 7e4]), "vector", ScaleRule())


def test_int8_holds_no_float_but_its_scales() -> None:
    arrays = INT8.store(torch.randn(6, 4), WEIGHT, ScaleRule()).arrays()
    assert {name: array.dtype for name, array in arrays.items()} == {"q": torch.int8, "scale": torch.float16}


def test_int8_has_one_scale_a_row_and_one_a_vector() -> None:
    assert INT8.arrays((6, 4), "weight")["scale"].shape == (6,)
    assert INT8.arrays((6,), "vector")["scale"].shape == (1,)


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(PrecisionMapError, match="'int7'.*'fp16', 'int8'"):
        get_precision("int7")
