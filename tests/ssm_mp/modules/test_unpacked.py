"""Small tensors that are unpacked once."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.precisions.int8 import Int8
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ScaleRule


def float_values() -> Stored:
    return FloatTensor(torch.randn(8))


def int8_values() -> Stored:
    return Int8().store(torch.randn(8, 4), "weight", ScaleRule())


@pytest.mark.parametrize("stored", [float_values, int8_values])
def test_gradients_pass_by_what_was_unpacked_in_inference_mode(stored: object) -> None:
    assert callable(stored)
    held, unpacked = stored(), Unpacked(lambda tensor: tensor + 1)
    with torch.inference_mode():
        first = unpacked(held)
    assert unpacked(held) is first
    x = torch.randn(first.shape, requires_grad=True)
    (x * unpacked(held)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, held.tensor() + 1)


def test_a_norm_that_has_evaluated_lets_gradients_through() -> None:
    norm = NormForm(1e-5, one_plus=True).module({"weight": FloatTensor(torch.randn(8))}, None)
    with torch.inference_mode():
        norm(torch.randn(3, 8))
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
