"""One component for all experts of a layer, in every precision, against a component of its own for each."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.modules.experts import ExpertsForm, ExpertsLinear
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.grouped import GroupedTensor
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ScaleRule

RULE = ScaleRule()
INPUTS: dict[str, InputQuantizer | None] = {
    "none": None, "dynamic": DynamicInput(), "static": StaticInput(torch.tensor([0.03]).half()),
}  # fmt: skip


def stored(weight: Tensor, precision: str) -> Stored:
    if precision == "fp32":
        return FloatTensor(weight)
    return PRECISIONS[precision].store(weight, "weight", RULE)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    ("precision", "inputs"),
    [*((name, "none") for name in ("fp32", *PRECISIONS)), ("int8", "dynamic"), ("int8", "static")],
)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 64, 128), (2, 33, 96), (3, 1, 1)])
def test_a_product_is_that_of_a_component_with_the_same_numbers(
    shape: tuple[int, int, int], precision: str, inputs: str, tokens: int
) -> None:
    experts, outputs, width = shape
    weight = stored(torch.randn(experts * outputs, width), precision)
    module = ExpertsForm(experts).module({"weight": weight}, INPUTS[inputs])
    x = torch.randn(tokens, width)
    for e in range(experts):
        rows = slice(e * outputs, (e + 1) * outputs)
        own: Stored = FloatTensor(weight.tensor()[rows].clone())
        if inputs != "none":
            held = weight.arrays()
            own = PRECISIONS["int8"].restore({k: v[rows].clone() for k, v in held.items()}, (outputs, width), "weight")
        with torch.no_grad():
            found, expected = module(x, e), Linear(own, None, INPUTS[inputs])(x)
        tolerance = 2e-4 if "4" in precision else 2e-5  # codes of 4 bits are multiplied in fixed point on some CPUs
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 200), st.sampled_from(["fp16", "int8", "nf4", "int3"]))
def test_an_experts_rows_are_those_of_the_whole(experts: int, outputs: int, width: int, precision: str) -> None:
    weight = stored(torch.randn(experts * outputs, width), precision)
    whole = weight.tensor()
    for e in range(experts):
        rows, above = part(weight, e, experts)
        assert 0 <= above < 64
        assert torch.equal(rows.tensor()[above:], whole[e * outputs : (e + 1) * outputs])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4", "int4", "int3"])
def test_nothing_is_copied(precision: str) -> None:
    weight = stored(torch.randn(6 * 32, 64), precision)
    for suffix, array in part(weight, 3, 6)[0].arrays().items():
        whole = weight.arrays()[suffix]
        assert array.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert array.numel() == whole.numel() // 6


def part(weight: Stored, expert: int, experts: int) -> tuple[Stored, int]:
    """The rows of one of several experts, and how many stand before them."""
    size = weight.shape[0] // experts
    return weight.part(slice(expert * size, (expert + 1) * size))


def test_groups_that_reach_into_another_expert_begin_before_it() -> None:
    weight = stored(torch.randn(3 * 5, 24), "int4")
    rows, above = part(weight, 1, 3)
    assert isinstance(rows, GroupedTensor)
    assert above == 5  # 5 · 24 values fill no whole number of groups, and neither do fewer rows but none
    assert part(stored(torch.randn(3 * 8, 24), "int4"), 1, 3)[1] == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_a_changed_weight_is_noticed(replaced: bool) -> None:
    weight, other = (torch.randn(12, 8).half() for _ in range(2))
    held = FloatTensor(weight)
    module, x = ExpertsLinear(held, 3), torch.randn(40, 8)
    with torch.no_grad():
        module(x, 1)
        if replaced:
            held.value.data = other
        else:
            held.value.copy_(other)
        torch.testing.assert_close(module(x, 1), x @ other[4:8].float().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4"])
def test_a_copy_does_not_share_its_rows(precision: str) -> None:
    weight = stored(torch.randn(12, 8), precision)
    if isinstance(weight, FloatTensor):
        weight.value.requires_grad_()
    module, x = ExpertsLinear(weight, 3), torch.randn(4, 8)
    before = module(x, 2).detach()
    other = copy.deepcopy(module)
    with torch.no_grad():
        for array in module.weight.arrays().values():
            array.zero_()
        assert torch.equal(other(x, 2), before)


def test_only_the_weight_is_held() -> None:
    module = ExpertsLinear(stored(torch.randn(12, 8), "int8"), 3)
    before = list(module.state_dict())
    module(torch.randn(4, 8), 0)
    assert list(module.state_dict()) == before == ["weight.q", "weight.scale"]


def test_gradients_reach_the_rows_of_experts_that_were_asked() -> None:
    weight = FloatTensor(torch.randn(16, 8))
    weight.value.requires_grad_()
    module = ExpertsLinear(weight, 4)
    for _ in range(2):  # backward more than once, and without gradients between
        x, y = torch.randn(5, 8), torch.randn(2, 8)
        weight.value.grad = None
        (module(x, 1).square().sum() + module(y, 3).square().sum()).backward()
        rows = weight.value.detach().clone().requires_grad_()
        ((x @ rows[4:8].t()).square().sum() + (y @ rows[12:].t()).square().sum()).backward()
        assert weight.value.grad is not None
        assert rows.grad is not None
        torch.testing.assert_close(weight.value.grad, rows.grad)
        assert not weight.value.grad[:4].any()
        with torch.no_grad():
            assert not module(x, 1).requires_grad
            weight.value.mul_(0.5)


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_gradients_of_inputs_pass_after_a_call_that_allowed_none(precision: str) -> None:
    weight = stored(torch.randn(12, 8), precision)
    module, x = ExpertsLinear(weight, 3), torch.randn(20, 8, requires_grad=True)
    with torch.inference_mode():
        module(x, 1)
    module(x, 1).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.tensor()[4:8].sum(0).expand(20, 8))
