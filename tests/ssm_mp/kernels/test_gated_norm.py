"""The gated norm of Mamba-2: kernel and reference against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.kernels import calls
from ssm_mp.kernels.gated_norm import gated_norm, gated_norm_reference


def _kernel(y: Tensor, z: Tensor, weight: Tensor | None, groups: int, eps: float, order: str) -> Tensor:
    return calls.gated_norm(y, z, weight, groups, eps, order == "norm_first")


WAYS: dict[str, Any] = {"reference": gated_norm_reference, "kernel": _kernel, "chosen": gated_norm}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 70), st.sampled_from([0.01, 1.0, 40.0]),
    st.sampled_from(["gate_first", "norm_first"]), st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_norm_of_each_group(way: str, groups: int, size: int, scale: float, order: str, seed: int) -> None:
    y, z, weight = _inputs(groups * size, scale, seed)
    found = WAYS[way](y, z, weight, groups, 1e-5, order)
    gate = (z.double() * torch.sigmoid(z.double())).unflatten(-1, (groups, size))
    values = y.double().unflatten(-1, (groups, size))
    before, after = (gate, torch.ones_like(gate)) if order == "gate_first" else (torch.ones_like(gate), gate)
    gated = values * before
    expected = gated / (gated.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * after
    _require_close(found, expected.flatten(-2) * weight.double())


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_without_a_weight_there_is_a_gate_only(size: int) -> None:
    y, z, _ = _inputs(size, 3.0, 0)
    _require_close(gated_norm(y, z, None), y.double() * z.double() * torch.sigmoid(z.double()))
    _require_close(gated_norm_reference(y, z, None), y.double() * z.double() * torch.sigmoid(z.double()))


def test_what_is_no_number_stays_in_its_group() -> None:
    y, z, weight = _inputs(48, 1.0, 0)
    z[0, 1, 5], z[1, 2, 7] = torch.inf, torch.nan
    found, expected = (f(y, z, weight, 3, 1e-5) for f in (gated_norm, gated_norm_reference))
    assert torch.equal(found.isfinite(), expected.isfinite())


def _inputs(inner: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, z (part of a wider array) and weights, of two times three tokens."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, 3, inner + 5, generator=generator) * scale
    return torch.randn(2, 3, inner, generator=generator), wide[..., 5:], torch.randn(inner, generator=generator)


def _require_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
