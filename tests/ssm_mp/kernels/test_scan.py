"""Every scan of a CPU, and its reference, against the recurrences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.kernels import calls, scan
from tests.ssm_mp.kernels.scan_cases import (
    CASES,
    recurrence_inputs,
    recurrence_truth,
    require_close,
    selective_inputs,
    selective_truth,
)

SELECTIVE = {
    "reference": scan.selective_scan_reference,
    "steps": scan.selective_scan_steps,
    "kernel": calls.selective_scan,
    "chosen": scan.selective_scan,
}
RECURRENCE = {"steps": scan.shared_step_recurrence, "kernel": calls.shared_step_recurrence}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", SELECTIVE)
def test_the_selective_scan_agrees_with_float64(way: str, case: str) -> None:
    inputs = selective_inputs(case)
    before = {name: value.clone() for name, value in inputs.items() if value is not None}
    require_close(_any(SELECTIVE[way])(**inputs), selective_truth(inputs))
    for name, value in before.items():
        assert torch.equal(_tensor(inputs[name]), value), f"{name} was changed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", RECURRENCE)
def test_the_shared_step_recurrence_agrees_with_float64(way: str, case: str) -> None:
    inputs = recurrence_inputs(case)
    before = _tensor(inputs["state"]).clone()
    require_close(_any(RECURRENCE[way])(**inputs), recurrence_truth(inputs))
    assert torch.equal(_tensor(inputs["state"]), before)


@given(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_the_shared_step_scan_agrees_with_its_float64_reference(b: int, length: int, state: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inputs = (
        torch.randn(b, length, 8, generator=g), torch.randn(b, length, 8, generator=g) * 3,
        -torch.rand(4, generator=g) * 9, torch.randn(4, 8, generator=g), torch.randn(8, 4, generator=g),
        torch.randn(8, generator=g), torch.randn(b, length, 8, generator=g),
        torch.randn(b, 4, generator=g) * state,
    )  # fmt: skip
    expected = scan.shared_step_scan_reference(*(x.double() for x in inputs))
    require_close(scan.shared_step_scan(*inputs), expected)


@pytest.mark.parametrize("cut", [1, 7, 23])
def test_a_scan_in_two_parts_is_the_scan_of_the_whole(cut: int) -> None:
    inputs = {
        name: _tensor(value) for name, value in selective_inputs("huge and vanishing steps").items() if name != "state"
    }
    y, last = scan.selective_scan(**inputs)
    first = {name: value[:, :cut] if value.dim() == 3 else value for name, value in inputs.items()}
    rest = {name: value[:, cut:] if value.dim() == 3 else value for name, value in inputs.items()}
    y_first, state = scan.selective_scan(**first)
    y_rest, end = scan.selective_scan(**rest, state=state)
    torch.testing.assert_close(torch.cat((y_first, y_rest), dim=1), y)
    torch.testing.assert_close(end, last)


def test_a_scan_that_needs_gradients_is_not_the_kernel() -> None:
    a = torch.randn(1, 4, 16)
    assert calls.usable(a)
    assert not calls.usable(a.requires_grad_())
    with torch.no_grad():
        assert calls.usable(a)


def test_steps_that_are_not_numbers_stay_so() -> None:
    inputs = {
        name: _tensor(value)
        for name, value in selective_inputs("more channels than a block, states no power of two").items()
        if name != "state"
    }
    inputs["dt"][1, 3, 30] = torch.nan
    y, last = scan.selective_scan(**inputs)
    assert torch.isnan(y[1, 3:, 30]).all()
    assert torch.isnan(last[1, 30]).all()
    assert torch.isfinite(y[0]).all()


def _any(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    return function


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_softplus_of_the_kernel_is_exact_where_it_is_tiny_and_where_it_is_large() -> None:
    dt = torch.linspace(-30, 60, 901).reshape(1, 901, 1).repeat(1, 1, 16)
    ones = torch.ones_like(dt)
    # without decay, the state is the sum of all steps so far
    y, _ = calls.selective_scan(ones, dt, torch.zeros(16, 1), ones[..., :1], ones[..., :1], torch.zeros(16), ones, None)
    expected = F.softplus(dt.double()).cumsum(dim=1) * F.silu(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(y.double(), expected, rtol=3e-6, atol=0)
