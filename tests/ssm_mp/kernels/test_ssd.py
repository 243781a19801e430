"""Every scan of Mamba-2 against the recurrence in float64, and gradients against the reference's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.kernels import calls, ssd
from tests.ssm_mp.kernels.scan_cases import require_close
from tests.ssm_mp.kernels.ssd_cases import CASES, Sizes, inputs_of, truth

WAYS: dict[str, Any] = {
    "reference": ssd.ssd_scan_reference,
    "chunked": ssd.ssd_scan_chunked,
    "kernel": calls.ssd_scan,
    "chosen": ssd.ssd_scan,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_every_scan_agrees_with_float64(way: str, case: str) -> None:
    inputs = inputs_of(CASES[case])
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    require_close(WAYS[way](**inputs), truth(inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed"


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Sizes,
        b=st.integers(1, 3),
        length=st.integers(1, 140),
        heads=st.just(4),
        width=st.integers(1, 40),
        states=st.integers(1, 40),
        groups=st.sampled_from([1, 2, 4]),
        step=st.sampled_from([0.5, 5.0]),
        shift=st.sampled_from([-6.0, 0.0]),
        state=st.booleans(),
    ),
    st.integers(0, 99),
)
def test_scans_of_any_size_agree_with_float64(sizes: Sizes, seed: int) -> None:
    inputs = inputs_of(sizes, seed)
    expected = truth(inputs)
    for way in ("chunked", "kernel"):
        require_close(WAYS[way](**inputs), expected)


def test_a_state_may_lie_in_memory_in_either_order() -> None:
    inputs = inputs_of(CASES["heads of 64, states of 128"])
    expected = ssd.ssd_scan(**inputs)
    turned = inputs["state"].transpose(2, 3).contiguous().transpose(2, 3)
    for ours, theirs in zip(ssd.ssd_scan(**{**inputs, "state": turned}), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", ["kernel", "chosen"])
def test_what_is_no_number_spoils_what_comes_after_it_in_its_head_only(way: str) -> None:
    inputs = inputs_of(CASES["heads of 64, states of 128"])
    inputs["dt"] = inputs["dt"].clone()
    inputs["dt"][0, 100, 1] = torch.nan
    y, last = WAYS[way](**inputs)
    assert y[0, 100:, 1].isnan().all()
    assert last[0, 1].isnan().all()
    assert y[0, :, 0].isfinite().all()
    assert y[0, :96, 1].isfinite().all()  # tokens of the same tile may be spoilt


def test_decays_are_exact_down_to_what_no_sum_feels_and_nothing_below() -> None:
    length, halvings = 100, 10
    x, ones = torch.zeros(1, length, 1, 16), torch.ones(1, length, 1, 1)
    x[0, 0] = 1.0
    y, last = calls.ssd_scan(
        x, ones[..., 0], torch.tensor([-halvings * math.log(2.0)]), ones, ones, torch.zeros(1), torch.zeros(1),
        (1.0, 1.0), None,
    )  # fmt: skip
    felt = 64 // halvings + 1
    torch.testing.assert_close(y[0, :felt, 0, 0], 2.0 ** (-halvings * torch.arange(felt)), rtol=1e-5, atol=0)
    assert (y[0, felt:] == 0).all()  # and no denormal number, which some CPUs multiply a hundred times as slowly
    assert (last == 0).all()


@pytest.mark.parametrize("case", ["odd sizes, two groups", "steps of thousands", "limits on both sides"])
def test_gradients_of_the_chunked_scan_are_those_of_the_reference(case: str) -> None:
    found, expected = (gradients(way, case) for way in ("chunked", "reference"))
    for name, gradient in expected.items():
        assert found[name].isfinite().all()
        assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def gradients(way: str, case: str) -> dict[str, Tensor]:
    """Of a weighted sum of outputs and last state, by input, in float64."""
    inputs = inputs_of(replace(CASES[case], state=True))
    wanted = {n: v.double().clone().requires_grad_() for n, v in inputs.items() if isinstance(v, Tensor)}
    y, last = WAYS[way](**{**inputs, **wanted})
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(values.shape, generator=generator, dtype=torch.float64) for values in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return {name: value.grad for name, value in wanted.items() if value.grad is not None}
