"""What is particular to each precision; what all of them keep is in `test_contract.py`."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions.float16 import FP16
from ssm_mp.precisions.int8 import INT8
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import Role
from ssm_mp.scheme import ScaleRule

WEIGHT: Role = "weight"
ERRORS = {"fp16": 0.001, "int8": 0.005, "int6": 0.017, "int5": 0.034, "nf4": 0.16, "int4": 0.08, "int3": 0.17}
"""Largest error of a value, as a share of the largest in its group."""


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("role", ["weight", "vector", "bias"])
def test_values_come_back_close_in_every_role(name: str, role: Role) -> None:
    tensor = torch.randn(12) if role != "weight" else torch.randn(12, 7)
    stored = PRECISIONS[name].store(tensor, role, ScaleRule())
    assert float((stored.tensor() - tensor).abs().max()) <= ERRORS[name] * float(tensor.abs().max())


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
